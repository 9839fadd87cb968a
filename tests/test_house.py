"""What the tree promises: who imports whom, every way of installing it works, the documents tell the truth."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastbert
from fastbert.cli.__main__ import COMMANDS
from fastbert.version import DISTRIBUTION, TRIED, VERSION, minor
from tests.mutations import FAULTS, plant

ROOT = Path(__file__).resolve().parent.parent
INFO = f"{DISTRIBUTION.replace('-', '_')}-{VERSION}.dist-info"

# Who may import whom inside the library: each package or module, and those that it may import.
MAY_IMPORT: dict[str, set[str]] = {
    "exporting": set(),
    "kernels": set(),
    "numerics": set(),
    "quality": set(),
    "runtime.known": set(),
    "runtime.wrappers": set(),
    "usage": set(),
    "version": set(),
    "checkpoints": {"usage"},
    "convert": {"usage", "version"},
    "runtime.registry": {"runtime.wrappers"},
    "tuned": {"kernels", "version"},
    "ops": {"kernels", "tuned"},
    "runtime.support": {"exporting", "ops", "runtime.known", "runtime.registry", "runtime.wrappers", "version"},
    "layers.gemm": {"ops", "runtime.support"},
    "runtime.packing": {"ops", "runtime.support"},
    "runtime.readers": {"runtime.known", "runtime.registry", "runtime.support", "runtime.wrappers"},
    "layers.context": {"runtime.packing"},
    "layers.norm": {"layers.gemm", "runtime.known", "runtime.support"},
    "models.heads": {"ops", "runtime.known", "runtime.readers", "runtime.registry", "runtime.support"},
    "layers.attention": {"layers.context", "layers.gemm", "layers.norm", "ops", "runtime.support"},
    "layers.derived": set(),
    "layers.disentangled": {
        "layers.attention",
        "layers.context",
        "layers.derived",
        "layers.gemm",
        "layers.norm",
        "ops",
        "runtime.support",
    },
    "layers.feed_forward": {"layers.context", "layers.gemm", "layers.norm", "ops", "runtime.support"},
    "layers.layer": {
        "layers.attention",
        "layers.context",
        "layers.feed_forward",
        "layers.gemm",
        "layers.norm",
        "ops",
        "runtime.support",
        "runtime.wrappers",
    },
    "layers.embeddings": {"layers.layer", "ops", "runtime.known", "runtime.registry", "runtime.support"},
    "layers.copies": {"layers.derived", "layers.gemm", "layers.layer", "runtime.support"},
    "layers.low_precision": {"layers.copies", "runtime.support"},
    "layers.fp8": {"layers.copies", "layers.gemm", "layers.low_precision", "numerics", "ops", "runtime.support"},
    "layers.int8": {"layers.copies", "layers.gemm", "layers.low_precision", "numerics", "ops", "runtime.support"},
    "layers.prepacked": {"layers.copies", "layers.gemm", "ops"},
    "models.family": {"layers.layer", "models.heads", "runtime.readers"},
    "runtime.coverage": {"layers.derived", "layers.layer", "runtime.registry", "runtime.support", "runtime.wrappers"},
    "runtime.arguments": {"layers.embeddings", "runtime.packing", "runtime.registry", "runtime.support"},
    "runtime.graphs": {
        "kernels",
        "layers.context",
        "layers.copies",
        "layers.layer",
        "runtime.coverage",
        "runtime.packing",
        "runtime.registry",
        "runtime.support",
    },
    "runtime.settings": {"exporting", "layers.copies", "runtime.coverage", "runtime.graphs", "runtime.readers"},
    "fuse": {
        "layers.copies",
        "layers.fp8",
        "layers.int8",
        "layers.layer",
        "layers.low_precision",
        "layers.prepacked",
        "runtime.readers",
        "runtime.registry",
        "runtime.settings",
        "runtime.support",
        "runtime.wrappers",
        "version",
    },
    "flatten": {"fuse", "layers.embeddings", "runtime.packing", "runtime.registry"},
    "runtime.plan": {
        "exporting",
        "layers.embeddings",
        "runtime.arguments",
        "runtime.coverage",
        "runtime.known",
        "runtime.packing",
        "runtime.readers",
        "runtime.registry",
        "runtime.settings",
        "runtime.support",
    },
    "explain": {
        "fuse",
        "layers.embeddings",
        "runtime.plan",
        "runtime.readers",
        "runtime.registry",
        "runtime.settings",
        "runtime.support",
    },
    "runtime.encoder": {
        "layers.context",
        "layers.gemm",
        "layers.layer",
        "runtime.known",
        "runtime.packing",
        "runtime.plan",
        "runtime.readers",
        "runtime.registry",
        "runtime.settings",
        "runtime.support",
        "runtime.wrappers",
    },
    "attention_maps": {"fuse", "runtime.readers", "runtime.registry", "runtime.support"},
    "embed": {
        "checkpoints",
        "explain",
        "flatten",
        "fuse",
        "layers.embeddings",
        "runtime.readers",
        "runtime.registry",
        "runtime.support",
        "usage",
        "version",
    },
    "models.probe": {
        "explain",
        "fuse",
        "layers.attention",
        "layers.embeddings",
        "layers.feed_forward",
        "layers.gemm",
        "layers.layer",
        "models.family",
        "numerics",
        "runtime.known",
        "runtime.packing",
        "runtime.readers",
        "runtime.registry",
        "runtime.support",
    },
    "sensitivity": {"explain", "fuse", "runtime.readers"},
    "models.classes": {
        "fuse",
        "layers.attention",
        "layers.embeddings",
        "layers.feed_forward",
        "layers.layer",
        "models.family",
        "models.heads",
        "models.probe",
        "runtime.encoder",
        "runtime.graphs",
        "runtime.known",
        "runtime.plan",
        "runtime.readers",
        "runtime.registry",
    },
    "verify": {
        "explain",
        "fuse",
        "layers.embeddings",
        "layers.low_precision",
        "numerics",
        "quality",
        "runtime.registry",
        "sensitivity",
    },
    "calibration": {"fuse", "layers.copies", "layers.int8", "numerics", "runtime.registry", "verify"},
    "models": {
        "layers.attention",
        "layers.disentangled",
        "layers.feed_forward",
        "layers.layer",
        "layers.norm",
        "models.classes",
        "models.family",
        "models.heads",
        "runtime.packing",
        "runtime.plan",
        "runtime.readers",
        "runtime.registry",
        "runtime.support",
    },
    "__init__": {
        "attention_maps",
        "calibration",
        "convert",
        "embed",
        "explain",
        "exporting",
        "flatten",
        "fuse",
        "tuned",
        "verify",
        "version",
    },
    "seeing": {"attention_maps", "usage"},
    "measure.names": set(),
    "measure.gates": set(),
    "measure.counts": {
        "ops",
        "runtime.registry",
    },
    "measure.machine": {
        "measure.counts",
        "runtime.support",
        "tuned",
        "version",
    },
    "measure.cases": {
        "measure.names",
        "runtime.support",
        "usage",
    },
    "measure.records": {
        "measure.counts",
        "measure.gates",
        "measure.machine",
        "usage",
    },
    "measure.peers": {
        "calibration",
        "fuse",
        "kernels",
        "measure.cases",
        "runtime.packing",
        "runtime.support",
        "version",
    },
    "measure.trace": {
        "measure.counts",
        "ops",
        "runtime.registry",
        "usage",
    },
    "measure": {
        "checkpoints",
        "explain",
        "fuse",
        "kernels",
        "measure.cases",
        "measure.counts",
        "measure.gates",
        "measure.machine",
        "measure.peers",
        "measure.records",
        "measure.trace",
        "numerics",
        "runtime.support",
        "tuned",
        "usage",
        "verify",
    },
    "tune": {
        "kernels",
        "measure.cases",
        "measure.machine",
        "numerics",
        "tuned",
    },
    "cli": {
        "checkpoints",
        "convert",
        "embed",
        "fuse",
        "kernels",
        "layers.embeddings",
        "measure",
        "measure.cases",
        "measure.counts",
        "measure.gates",
        "measure.machine",
        "measure.names",
        "measure.peers",
        "measure.records",
        "runtime.support",
        "seeing",
        "tune",
        "tuned",
        "usage",
        "verify",
        "version",
    },
}


# Lines that a package or module of that table may have.
MOST_LINES = 1500


def sources() -> list[tuple[str, Path]]:
    """(dotted name, file) of every module of the library; `fastbert.kernels` stands for the files in kernels/."""
    found = [("fastbert.kernels." + path.stem, path) for path in sorted((ROOT / "kernels").glob("*.py"))]
    for path in sorted((ROOT / "fastbert").rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts[1] != "kernels":
            found.append((".".join(relative.with_suffix("").parts), path))
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """The absolute dotted name of everything `path` imports, anywhere in it; relative imports resolved from `name`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(name.split(".")[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """The entry of MAY_IMPORT a dotted name in fastbert belongs to: "fastbert.kernels.linear" -> "kernels"."""
    parts = module.removeprefix("fastbert").lstrip(".").split(".")
    return next((name for name in (".".join(parts[:2]), parts[0]) if name in MAY_IMPORT), "__init__")


@pytest.mark.parametrize(("name", "path"), sources(), ids=[name for name, _ in sources()])
def test_layering(name: str, path: Path) -> None:
    here = room(name)
    assert here != "__init__" or path.name == "__init__.py", f"{name} is new: say in MAY_IMPORT what it may import"
    for target in imports(name, path):
        root = target.split(".")[0]
        assert root not in {"kernels", "tests", "benchmarks", "examples"}, f"{name} imports {target}"
        if here == "kernels":
            allowed = root in sys.stdlib_module_names | {"torch", "triton"} or target.startswith("fastbert.kernels.")
            assert allowed, f"{name} imports {target}; kernels import torch, triton and each other"
        elif root == "fastbert" and room(target) != here:
            assert room(target) in MAY_IMPORT[here], f"{name} imports {target}"


def test_every_permission_is_used_and_none_leads_in_a_circle() -> None:
    used: dict[str, set[str]] = {name: set() for name in MAY_IMPORT}
    for name, path in sources():
        here = room(name)
        used[here] |= {room(target) for target in imports(name, path) if target.split(".")[0] == "fastbert"} - {here}
    assert used == MAY_IMPORT
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError


def test_no_room_grows_too_large() -> None:
    """Of fastbert/, that is: kernels stand by themselves."""
    lines: Counter[str] = Counter()
    for name, path in sources():
        lines[room(name)] += len(path.read_text(encoding="utf-8").splitlines())
    large = {name: count for name, count in lines.items() if name != "kernels" and count >= MOST_LINES}
    assert not large, f"{large}: {MOST_LINES} lines or more; give a part of it a row of its own in MAY_IMPORT"


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_only_the_shell_runs_the_command_line(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for target in imports("", path):
            assert not target.startswith("fastbert.cli"), (
                f"{path} imports {target}; what commands do is in other packages"
            )


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_loads_no_torch(arguments: list[str]) -> None:
    """So that it takes a tenth of a second: what the interpreter and argparse take, and a few modules more."""
    code = f"""
import sys
from fastbert.cli.__main__ import main
try:
    main({arguments})
except SystemExit as ended:
    assert ended.code == 0
heavy = {{"torch", "transformers", "numpy", "triton", "matplotlib", "pyarrow"}} & set(sys.modules)
print(sorted(heavy), len([name for name in sys.modules if name.startswith("fastbert")]))
"""
    heavy, ours = run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1].rsplit(" ", 1)
    assert heavy == "[]"
    assert int(ours) < 20


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_nobody_imports_kernels_by_its_bare_name(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        roots = {target.split(".")[0] for target in imports("", path)}
        assert "kernels" not in roots, f"{path}: from fastbert.kernels import ..., the bare name is Hugging Face's"


def test_kernels_is_a_symlink_to_a_bare_directory() -> None:
    link = ROOT / "fastbert" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    # With it, `import kernels` from the repository root would shadow the distribution transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(*command: str, cwd: Path, path: str | Path | None = None) -> str:
    """The standard output of a command run in `cwd`, with only `path` on PYTHONPATH; its stderr where it fails."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


IMPORTED = "import fastbert, fastbert.kernels.reference as r; print(fastbert.__file__, r.__file__, sep='\\n')"


def found_in(place: Path) -> list[str]:
    """What IMPORTED prints where `place` is what was imported from."""
    return [str(place / "fastbert" / "__init__.py"), str(place / "fastbert" / "kernels" / "reference.py")]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what packaging reads, so that building leaves nothing behind and finds nothing left behind."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fastbert", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(hook: str, source: Path, target: Path) -> Path:
    """Calls one hook of the build backend in `source`, without a network; returns what it built in `target`."""
    target.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))"
    return target / run(sys.executable, "-c", code, cwd=source).splitlines()[-1]


def unpack(archive: Path, target: Path) -> Path:
    shutil.unpack_archive(archive, target, format="zip" if archive.suffix == ".whl" else "gztar")
    return target


def files(folder: Path) -> Iterator[Path]:
    """Every file under `folder`, through symlinks too (Path.rglob follows none)."""
    for entry in folder.iterdir():
        yield from files(entry) if entry.is_dir() else [entry]


def test_bare_checkout_imports(checkout: Path) -> None:
    assert run(sys.executable, "-c", IMPORTED, cwd=checkout, path=checkout).splitlines() == found_in(checkout)


def test_wheel(checkout: Path, tmp_path: Path) -> None:
    wheel = build("build_wheel", checkout, tmp_path / "wheel")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {path.relative_to(checkout).as_posix() for path in files(checkout / "fastbert")} <= names
    assert {name.split("/")[0] for name in names} == {"fastbert", INFO}
    installed = unpack(wheel, tmp_path / "installed")
    assert run(sys.executable, "-c", IMPORTED, cwd=tmp_path, path=installed).splitlines() == found_in(installed)

    # The reference environment lies within what the package says it supports, and pins all of it.
    lines = re.findall(r"^[^#\s].*", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    pins = {pin.name: pin for pin in map(Requirement, lines)}
    metadata = (installed / INFO / "METADATA").read_text(encoding="utf-8")
    assert f"\nName: {DISTRIBUTION}\nVersion: {VERSION}\n" in metadata
    for wanted in map(Requirement, re.findall(r"^Requires-Dist: (.*)", metadata, re.M)):
        if wanted.name == DISTRIBUTION:
            continue  # one extra that takes in another
        (pin,) = pins[wanted.name].specifier
        assert wanted.specifier.contains(pin.version), f"constraints.txt pins {wanted.name} outside {wanted.specifier}"


def test_sdist_builds_the_same_wheel(checkout: Path, tmp_path: Path) -> None:
    wheel = build("build_wheel", checkout, tmp_path / "wheel")
    (source,) = unpack(build("build_sdist", checkout, tmp_path / "sdist"), tmp_path / "source").iterdir()
    again = build("build_wheel", source, tmp_path / "again")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_editable_install_imports(checkout: Path, tmp_path: Path) -> None:
    site = unpack(build("build_editable", checkout, tmp_path / "editable"), tmp_path / "site")
    # -S leaves out the .pth files of the environment this runs in, which may hold an editable install of its own; first
    # on the path, the finder of the one under test comes before that one's, which has the same name.
    packages = os.pathsep.join(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)
    code = f"import site, sys; sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r}); {IMPORTED}"
    assert run(sys.executable, "-S", "-c", code, cwd=tmp_path, path=packages).splitlines() == found_in(checkout)


STAND_IN = """
class Named:
    def __init__(self, *args, **kwargs): pass

CUDAProperties = Device = LayerRepository = FuncRepository = LocalLayerRepository = Named

class Mode:
    INFERENCE = TRAINING = TORCH_COMPILE = 0

def use_kernel_forward_from_hub(name): return lambda cls: cls
def use_kernelized_func(*functions): return lambda cls: cls
def get_kernel(*args, **kwargs): raise FileNotFoundError
register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = kernelize = get_kernel
"""

TRANSFORMERS = """
import sys
from transformers import BertConfig, BertModel
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available())
before = set(sys.modules)
import fastbert
fastbert.BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
from types import FunctionType
# Importing the module fastbert.fuse for the first time would bind this name to it.
assert isinstance(fastbert.fuse, FunctionType) and isinstance(fastbert.verify, FunctionType)
"""

# transformers and torch load triton where it is installed; fastbert adds nothing to that until a kernel is launched.
ADDED = """
print(sorted(name for name in set(sys.modules) - before if name.startswith(("triton", "fastbert.kernels"))))
"""


def test_transformers_imports_from_the_root_without_the_distribution_kernels() -> None:
    # Also true where the real one is installed: its metadata, which transformers goes by, is hidden.
    hide = """
import importlib.metadata
find = importlib.metadata.version
def version(name):
    if name == "kernels":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.version = version
"""
    available, added = run(sys.executable, "-c", hide + TRANSFORMERS + ADDED, cwd=ROOT).splitlines()[-2:]
    assert available == "False"
    assert ast.literal_eval(added) == [
        "fastbert.kernels",
        "fastbert.kernels.cpu",
        "fastbert.kernels.cpu_int8",
        "fastbert.kernels.cpu_prepacked",
        "fastbert.kernels.launch",
        "fastbert.kernels.reference",
        "fastbert.kernels.reference_fp8",
        "fastbert.kernels.reference_int8",
    ]


def test_transformers_imports_from_the_root_with_the_distribution_kernels(tmp_path: Path) -> None:
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STAND_IN)
    metadata = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    code = TRANSFORMERS + "import kernels; print(kernels.__file__)"
    available, where = run(sys.executable, "-c", code, cwd=ROOT, path=tmp_path).splitlines()[-2:]
    assert available == "True"
    assert where == str(tmp_path / "kernels" / "__init__.py")


LAZY = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import fastbert
assert set(fastbert.__all__) <= set(dir(fastbert))
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
import fastbert.ops, torch
assert torch.ops.fastbert.linear.default
assert "transformers" not in sys.modules
import fastbert.runtime.encoder, fastbert.fuse, fastbert.verify  # which binds these names to the modules, elsewhere
from types import FunctionType
assert isinstance(fastbert.fuse, FunctionType) and isinstance(fastbert.verify, FunctionType)
from fastbert import *
assert fuse is fastbert.fuse and issubclass(BertModel, torch.nn.Module)
try:
    fastbert.fused
except AttributeError as error:
    assert str(error) == "module 'fastbert' has no attribute 'fused'"
else:
    raise AssertionError("has a name that it has not")
from transformers import BertConfig
shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
model = BertModel(BertConfig(vocab_size=8, **shape)).eval()
assert not torch.cuda.is_initialized()
with torch.inference_mode():
    model(torch.ones(2, 3, dtype=torch.int64))
assert "ran fused" in str(fastbert.explain(model)), fastbert.explain(model)
"""


def test_import_loads_nothing_before_it_is_used_and_all_runs_without_triton() -> None:
    run(sys.executable, "-c", LAZY, cwd=ROOT)


def test_commands_the_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text, re.M))
        assert named, name
        assert {first or second for first, second in named} <= targets, name


def listed() -> list[str]:
    """The files of the tree, those that are new too."""
    return run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).strip("\0").split("\0")


def test_one_version() -> None:
    logged = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert logged is not None
    assert logged[1] == fastbert.__version__ == VERSION


def test_nothing_would_install_the_other_project_of_this_name() -> None:
    """`fastbert` on the package index is not this: what installs goes by DISTRIBUTION, or by the checkout."""
    other = re.compile(r"""pip3? install\b[^`\n]*[\s'"]fastbert(?![-\w./])|\bfastbert\[\w+\]['"`]|["']fastbert[=~>]=""")
    for text in ("pip install fastbert", "pip install -U 'fastbert[x]'", '"fastbert[x]"', "'fastbert>=1'"):
        assert other.search(text), text
    for text in (f"pip install '{DISTRIBUTION}[x]'", "pip install '.[x]'", "fastbert verify --model x"):
        assert not other.search(text), text
    for name in listed():
        path = ROOT / name
        if path.is_file() and name != "tests/test_house.py":
            found = other.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found}"


def test_documents_name_the_versions_that_are_tried() -> None:
    oldest = {name: ".".join(map(str, minor(tried[0]))) for name, tried in TRIED.items()}
    newest = {name: ".".join(map(str, minor(tried[-1]))) for name, tried in TRIED.items()}
    told = " and ".join(f"{name} >= {oldest[name]} (tried up to {newest[name]})" for name in ("torch", "transformers"))
    assert f"Requires {told}" in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    logged = f"torch from {oldest['torch']} on, transformers from {oldest['transformers']} on (tried up to "
    logged += f"{newest['transformers']}) and triton {oldest['triton']} to {newest['triton']}"
    assert logged in " ".join((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split())


def test_no_paths_of_one_machine() -> None:
    # Spelled in pieces, so that this file holds none of them either.
    pattern = re.compile("|".join(rf"(?<![\w.])/{place}/\w" for place in ("work", "root", "home", "opt", "Users")))
    for name in listed():
        path = ROOT / name
        if path.is_file():
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found}"


def tracked(*suffixes: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the files of the tree that end so, but for this one, which holds what it forbids."""
    for name in listed():
        path = ROOT / name
        if path.is_file() and name.endswith(suffixes) and name != "tests/test_house.py":
            yield name, path.read_text(encoding="utf-8")


WORDS = {
    r"(?<![\w.])8[- ]bits?\b": "FP8",
    r"\bone's own\b": "custom",
    r"\bmatrix[- ]products?\b|\bPRODUCTS\b": "matmul or GEMM",
    r"\bderived class|\bchild class": "subclass",
    r"\bspeed-ups?\b": "speedup",
    r"\bof the floor\b": "of roofline",
}
"""What is not said here, and the field's word for it."""


def test_words_are_the_fields() -> None:
    for banned, word in WORDS.items():
        for name, text in tracked(".py", ".md", ".toml", "Makefile"):
            found = re.search(banned, text)
            assert not found, f"{name} says {found[0]!r}; say {word}"


def test_errors_of_the_library_name_arguments() -> None:
    """The command line puts its option in their place: `UsageError.argument`."""
    option = re.compile(r"(?<![\w-])--[a-z]")
    assert option.search("--model x: no such folder")
    for name, path in sources():
        if room(name) == "cli":
            continue
        raises = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Raise)]
        for node in (part for each in raises for part in ast.walk(each)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not option.search(node.value), f"{path}, line {node.lineno}: names an option"


# Annotations of the library that say nothing: 663 before they were gone through.
MOST_ANY = 200


def test_any_is_rare() -> None:
    """The name `Any` wherever it is used, and not where it is imported."""
    nodes = (node for _, path in sources() for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    count = sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes)
    assert count <= MOST_ANY, f"{count} uses of Any; name the type, or object where any will do"


@pytest.mark.parametrize("name", FAULTS)
def test_faults_can_be_planted(name: str, tmp_path: Path) -> None:
    """Those of `make mutants`: where the line has changed, so must the fault."""
    (tmp_path / FAULTS[name].file).parent.mkdir(parents=True)
    shutil.copy(ROOT / FAULTS[name].file, tmp_path / FAULTS[name].file)
    plant(FAULTS[name], tmp_path)
