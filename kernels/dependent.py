"""Programmatic dependent launch: a kernel is launched while the one before it runs, and waits for it as it begins.

Every kernel that `launch.dependent` launches so begins with `wait_for_previous`, before anything is read or written and
before any return: a kernel whose programs had not waited could end before the one before it, and the next, which waits
for this one alone, would read what the first has not written yet.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Waits until the kernel before has ended and what it wrote can be read; from here the next may be launched."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
