"""What the distribution is called, its version, and the versions of others it is tried under.

Nothing is imported from the package here, nor from outside the standard library: the build reads this file by itself.
"""

from __future__ import annotations

import re
import warnings

DISTRIBUTION = "fastbert-triton"
"""What pip calls what is imported as `fastbert`: under that name the package index has another project."""

VERSION = "0.1.0"

TRIED = {
    "torch": ("2.11.0", "2.13.0"),
    "transformers": ("5.4.0", "5.17.0", "5.24.0"),
    "triton": ("3.6.0", "3.7.1", "3.9.0"),
}
"""The versions tried: the oldest supported, that of constraints.txt, the newest. torch is tried as it is: by `make
compat` as constraints.txt pins it, by `make gpu` as the machine has it."""


def minor(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (5, 25) of "5.25.0.dev0"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def is_newer(package: str, version: str) -> bool:
    """Whether `version` of a package of TRIED is of a minor version after the newest tried."""
    return minor(version) > minor(TRIED[package][-1])


def warn_of_newer(package: str, version: str) -> None:
    """As models are first fused: where a package is newer than the newest tried, a warning says what that means."""
    if is_newer(package, version):
        warnings.warn(
            f"{package} {version} is newer than {TRIED[package][-1]}, the newest that fastbert {VERSION} has been "
            "tried with: what fastbert does not recognise in it runs the stock code. fastbert.explain(model) tells "
            "what runs fused.",
            RuntimeWarning,
            stacklevel=3,
        )


def install(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml names."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
