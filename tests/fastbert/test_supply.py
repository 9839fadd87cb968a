"""What others made is data: no code of a checkpoint runs, no pickle is loaded, no path leaves its folder."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.cli.__main__ import main
from fastbert.embed.encoder import read_recipe
from fastbert.usage import UsageError
from tests import models

ROOT = Path(__file__).resolve().parent.parent.parent


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def checkpoint(folder: Path) -> Path:
    models.seeded().save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def commands(folder: Path, tmp_path: Path) -> list[list[str]]:
    (tmp_path / "in.txt").write_text("abc\n")
    return [
        ["verify", "--model", str(folder)],
        ["embed", "--model", str(folder), "--output", str(tmp_path / "out"), str(tmp_path / "in.txt")],
        ["profile", "--model", str(folder), "--lengths", "3"],
    ]


def test_a_pickle_in_place_of_weights_does_not_run(tmp_path: Path) -> None:
    """Neither through the classes nor through a command; nor beside safetensors, which come first."""
    folder, sign = checkpoint(tmp_path / "model"), tmp_path / "it ran"
    expected = fastbert.BertModel.from_pretrained(folder).state_dict()
    torch.save({"embeddings.word_embeddings.weight": Payload(sign)}, folder / "pytorch_model.bin")
    beside = fastbert.BertModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(beside[name], value) for name, value in expected.items())
    (folder / "model.safetensors").unlink()
    with pytest.raises(Exception, match=r"(?i)weights_only|unsafe|unsupported"):
        fastbert.BertModel.from_pretrained(folder)
    for command in commands(folder, tmp_path):
        assert main(command) == 2, command
    assert not sign.exists()


def test_code_of_a_checkpoint_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nobody is asked whether it may."""
    folder, sign = checkpoint(tmp_path / "model"), tmp_path / "it ran"
    (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(sign)!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    for command in commands(folder, tmp_path):
        assert main(command) == 2, command
        assert "[y/N]" not in "".join(capsys.readouterr())
    assert not sign.exists()


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "1_Pooling/../../elsewhere"])
def test_a_recipe_reads_no_file_outside_of_its_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text('{"pooling_mode": "cls"}')
    folder = tmp_path / "model"
    folder.mkdir()
    modules = [{"type": "models.Transformer", "path": ""}, {"type": "models.Pooling", "path": path}]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UsageError, match="names a file outside of it"):
        read_recipe(folder)


def calls(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(dotted name, constant keyword arguments) of every call in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", ...) for k in node.keywords if k.arg}
            found.append((ast.unparse(node.func), given))
    return found


def test_the_sources_unpickle_nothing_and_trust_no_code() -> None:
    loads = 0
    for folder in ("fastbert", "kernels", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for name, given in calls(path):
                last = name.rsplit(".", 1)[-1]
                assert not name.startswith(("pickle.", "marshal.", "shelve.", "joblib.")), path
                # One exec: a launcher written out of the parameter names of a kernel of this package.
                writes_launchers = name == "exec" and path == ROOT / "kernels" / "compiled.py"
                assert writes_launchers or name not in ("eval", "exec", "os.system", "os.popen"), path
                assert not given.get("shell"), path
                assert not given.get("allow_pickle"), path
                assert not given.get("trust_remote_code"), path
                if name == "torch.load":
                    assert given.get("weights_only") is True, path
                if folder == "fastbert" and name.startswith("Auto") and last == "from_pretrained":
                    loads += 1
                    assert given.get("trust_remote_code") is False or "config" in given, path
    assert loads >= 5


@pytest.mark.usefixtures("here")
def test_what_embed_writes_is_the_users_own(tmp_path: Path) -> None:
    """By the umask, as any file of theirs; links in the folder are replaced, not followed."""
    folder, before = checkpoint(tmp_path / "model"), os.umask(0o077)
    out, target = tmp_path / "out", tmp_path / "target"
    command = ["--output", str(out), "--format", "npy", "--json", str(tmp_path / "in.txt")]
    try:
        (tmp_path / "in.txt").write_text("abc\n")
        assert main(["embed", "--model", str(folder), *command]) == 0
        assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o600}
        target.write_text("mine")
        (out / "part-00000.json").unlink()
        (out / "part-00000.npy").unlink()
        (out / "part-00000.npy").symlink_to(target)
        assert main(["embed", "--model", str(folder), *command]) == 0
    finally:
        os.umask(before)
    assert target.read_text() == "mine"
    assert not (out / "part-00000.npy").is_symlink()


def test_the_classes_are_stock_ones_to_a_checkpoint(tmp_path: Path) -> None:
    """What is saved names no class of this library, so that nobody needs it to load."""
    fastbert.fuse(models.seeded(hf.BertForMaskedLM)).save_pretrained(tmp_path)
    assert "fastbert" not in (tmp_path / "config.json").read_text()
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix in (".bin", ".py", ".pt")) == []
