"""The tokenizer of what is converted: its files as they are, or one of a WordPiece vocabulary."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig

from ..usage import UsageError, refused
from .sources import Source

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spm.model"),
)
AS_FILES_SAY = "as its files say"
_WORDPIECE = ("bert", "distilbert", "electra", "ernie")  # whose vocab.txt doesn't say whether it is cased
_SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
_UPPER_SHARE = 0.01
"""Of the tokens of a cased vocabulary a third have upper case; an uncased one has none, or a few odd ones."""


def write_tokenizer(
    source: Source, folder: Path, settings: PretrainedConfig, vocab: Path | None, cased: bool | None
) -> dict[str, object] | None:
    """Writes the tokenizer's files, and its padding token into `settings`; what is told of it, None: there is none.

    Raises:
        UsageError: a file is damaged, or doesn't fit the model.
    """
    there = [source.folder / name for name in FILES if (source.folder / name).is_file()]
    if vocab is not None:
        there = [vocab]
    names = {file.name for file in there} if vocab is None else {"vocab.txt"}
    if not names & {"tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spm.model"}:
        if source.format == "tensorflow":
            raise UsageError(f"{source.folder}: has no vocab.txt; expected one", "vocab")
        source.notes.append("no tokenizer: there are no files of one beside it")
        return None
    with refused(f"{source.folder}: its tokenizer can't be read", kinds=(OSError, ValueError)):
        for file in there:
            shutil.copyfile(file, folder / ("vocab.txt" if vocab is not None else file.name))
        said = json.loads((folder / "tokenizer_config.json").read_text()) if "tokenizer_config.json" in names else {}
        if not isinstance(said, dict):
            raise ValueError("tokenizer_config.json holds no settings by name")
    how = AS_FILES_SAY
    rows = settings.vocab_size
    if "tokenizer.json" not in names and "vocab.txt" in names and settings.model_type in _WORDPIECE:
        tokens = _read_vocabulary(vocab or source.folder / "vocab.txt", rows, source)
        settings.pad_token_id = tokens.index("[PAD]")
        if "do_lower_case" not in said:
            lower, how = _lower(source, tokens, cased)
            said = {"model_max_length": settings.max_position_embeddings, **said, "do_lower_case": lower}
            (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
            source.notes.append(f"tokenizer: {'lower case' if lower else 'cased'} {how}")
            cased = None
    if cased is not None and said.get("do_lower_case") is not (not cased):
        raise UsageError(f"{source.folder}: its tokenizer files decide that; expected it not to be told", "cased")
    with refused(f"{source.folder}: its tokenizer can't be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=settings, trust_remote_code=False)
        if how != AS_FILES_SAY:  # made here: then it is made whole
            tokenizer.save_pretrained(folder)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up of other files
        raise UsageError(f"{source.folder}: its tokenizer files hold no tokens of {settings.model_type}; expected some")
    if len(tokenizer) > rows:
        raise UsageError(
            f"{source.folder}: its tokenizer has {len(tokenizer)} tokens; expected at most {rows}, vocab_size"
        )
    if len(tokenizer) < rows:
        source.notes.append(f"the tokenizer has {len(tokenizer)} tokens, the model {rows} rows for them")
    about = {"class": type(tokenizer).__name__, "tokens": len(tokenizer), "case": how}
    return {**about, "lower_case": getattr(tokenizer, "do_lower_case", None)}


def _read_vocabulary(file: Path, rows: int, source: Source) -> list[str]:
    """The tokens of a vocab.txt, one a line."""
    with refused(f"{file}", "vocab", (OSError, ValueError), "UTF-8, a token a line"):
        text = file.read_bytes().decode()
    tokens = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    if missing := [token for token in _SPECIAL if token not in tokens]:
        raise UsageError(f"{file}: has no {', '.join(missing)}; expected a vocabulary of BERT", "vocab")
    twice = sorted(token for token, number in Counter(tokens).items() if number > 1)
    if twice:
        source.notes.append(f"{file.name} has {len(twice)} tokens twice, as {twice[0]!r}: the last line is its id")
    # Some add rows to the table until it is a multiple of these, for speed.
    if len(tokens) != rows and rows not in (-(-len(tokens) // n) * n for n in (8, 64, 128)):
        raise UsageError(f"{file}: has {len(tokens)} tokens; expected {rows}, the config's vocab_size", "vocab")
    return tokens


def _lower(source: Source, tokens: list[str], cased: bool | None) -> tuple[bool, str]:
    """(whether texts are made lower case, by what that is known)."""
    if cased is not None:
        return not cased, "as was asked"
    name = source.folder.resolve().name.lower()
    if match := re.search(r"(un)?cased", name):
        return match[1] is not None, f"by the folder's name, {name}"
    upper = sum(token != token.lower() for token in tokens if not re.fullmatch(r"\[.*\]", token))
    share = upper / len(tokens)
    return share < _UPPER_SHARE, f"by its vocabulary, where {upper} of {len(tokens)} tokens have upper case"
