"""Rows of text from files, one after the other, in bounded memory; what is wrong with a row is said, not dropped.

By the name of the file: .txt (a text a line), .jsonl or .ndjson (an object a line), .csv and .tsv (with a header),
these also with .gz after it; .parquet; "-" is standard input, a text a line. Encoding is UTF-8, with or without a mark.
"""

from __future__ import annotations

import csv
import functools
import gzip
import importlib.util
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..usage import UsageError, in_a_line
from ..version import install

LONGEST = 2**24
"""Characters of a line, or of a field of a .csv: more are not read into memory, whatever the file holds."""
KINDS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_PARQUET_ROWS = 4096


Text = str | tuple[str, str]
"""A text, or a query and a text that is scored for it."""
Fields = tuple[object, Any]
"""What a row has for an id and for a text."""


class Row(NamedTuple):
    """One row of the input."""

    number: int
    """Its place in all input, from 0."""
    key: object
    """Its id: what the id column holds, or its number."""
    text: Text | None
    """None where there is a problem."""
    problem: str | None


class Input:
    """Files of rows.

    Args:
        paths: files, or "-".
        column: the field that holds the text, of all formats but txt.
        key_column: the field that holds the id; None: rows are numbered.
        query_column: the field that holds a query, where rows are pairs.

    Raises:
        UsageError: a file isn't there, is of an unknown kind, or has no such column.
    """

    def __init__(
        self, paths: Sequence[str], column: str, key_column: str | None = None, query_column: str | None = None
    ) -> None:
        self.column, self.key_column, self.query_column = column, key_column, query_column
        self._named = {"column": column, "id_column": key_column, "query_column": query_column}
        self._files = [(path, _kind(path)) for path in paths]
        if list(paths).count("-") > 1:
            raise UsageError("- is given twice; standard input can be read once")
        for path, kind in self._files:
            for name in ("id_column", "query_column"):
                if kind == "txt" and self._named[name] is not None:
                    raise UsageError(f"is given with {path}, which has no columns", name)
        self.is_stream = "-" in paths
        self._sizes = [0 if path == "-" else os.path.getsize(path) for path, _ in self._files]
        self._done = 0
        self._position: Callable[[], int] = int
        """How many bytes of the file that is open have been read."""

    def fraction(self) -> float | None:
        """How much of the input has been read; None where that can't be told."""
        if not sum(self._sizes):
            return None
        return min(1.0, (self._done + self._position()) / sum(self._sizes))

    def __iter__(self) -> Iterator[Row]:
        return self.rows(lambda number: True)

    def rows(self, wanted: Callable[[int], bool]) -> Iterator[Row]:
        """Every row; of those that are not `wanted`, by number, the number alone, which is faster to read."""
        number = 0

        def is_wanted() -> bool:
            return wanted(number)

        for (path, kind), size in zip(self._files, self._sizes, strict=True):
            try:
                for found in self._values(path, kind, is_wanted):
                    if found is None:
                        yield Row(number, number, None, "not read")
                        number += 1
                        continue
                    key, value = found
                    problem = value.args[0] if isinstance(value, ValueError) else _problem(value)
                    if problem is None and self.key_column is not None:
                        problem = _problem(str(key)) if key is not None else "null"
                        problem = problem and f"{self.key_column} is {problem}"
                    own = number if key is None else key
                    yield Row(number, own, None if problem else value, problem)
                    number += 1
            except (OSError, EOFError, zlib.error) as error:
                raise UsageError(f"{path}: {in_a_line(error)}") from error
            self._done += size
            self._position = int

    def _values(self, path: str, kind: str, wanted: Callable[[], bool]) -> Iterator[Fields | None]:
        """(id or None, text, or a ValueError that says what is wrong) of every row of a file that is `wanted`."""
        if kind == "parquet":
            yield from self._parquet(path, wanted)
            return
        with open(sys.stdin.fileno() if path == "-" else path, "rb", closefd=path != "-") as raw:
            if path != "-":
                self._position = raw.tell
            # What is not UTF-8 becomes lone surrogates, which are looked for in every text.
            unpacked: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            newline = "" if kind in ("csv", "tsv") else "\n"
            text = io.TextIOWrapper(unpacked, "utf-8-sig", errors="surrogateescape", newline=newline)
            yield from self._csv(path, text, kind) if kind in ("csv", "tsv") else self._lines(text, kind, wanted)
            self._position = int

    def _lines(self, lines: io.TextIOWrapper, kind: str, wanted: Callable[[], bool]) -> Iterator[Fields | None]:
        for line in iter(functools.partial(lines.readline, LONGEST), ""):
            if len(line) == LONGEST and not line.endswith("\n"):
                while (rest := lines.readline(LONGEST)) and not rest.endswith("\n"):
                    pass
                yield None, ValueError(f"a line of more than {LONGEST} characters")
                continue
            if not wanted():
                yield None
                continue
            text = line.rstrip("\r\n")
            if kind == "txt":
                yield None, text
                continue
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield None, ValueError(f"not JSON: {error}")
                continue
            yield self._fields(found) if isinstance(found, dict) else (None, ValueError("not a JSON object"))

    def _csv(self, path: str, lines: io.TextIOWrapper, kind: str) -> Iterator[Fields]:
        csv.field_size_limit(LONGEST)
        reader = csv.DictReader(_bounded(lines), delimiter="\t" if kind == "tsv" else ",")
        self._need(path, reader.fieldnames or [])
        try:
            for found in reader:
                key, value = self._fields(found)
                extra = len(found.get(None, ()))  # a comma that isn't quoted, perhaps in the text
                yield key, ValueError(f"{extra} fields more than the header has") if extra else value
        except csv.Error as error:
            raise UsageError(f"{path}, line {reader.line_num}: {error}") from error

    def _parquet(self, path: str, wanted: Callable[[], bool]) -> Iterator[Fields | None]:
        if importlib.util.find_spec("pyarrow") is None:
            raise UsageError(f"{path}: parquet needs pyarrow, which is not installed: {install('embed')}")
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._need(path, file.schema_arrow.names)
                columns = [column for column in self._named.values() if column]
                rows = 0
                for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                    for i in range(len(batch)):
                        yield self._fields({name: batch[name][i].as_py() for name in columns}) if wanted() else None
                    rows += len(batch)
                    position = os.path.getsize(path) * rows // file.metadata.num_rows
                    self._position = functools.partial(int, position)
        except pyarrow.ArrowException as error:
            raise UsageError(f"{path}: {error}") from error

    def _need(self, path: str, names: Sequence[str]) -> None:
        for name, column in self._named.items():
            if column is not None and column not in names:
                raise UsageError(f"{column}: {path} has no such column; it has {', '.join(names) or 'none'}", name)

    def _fields(self, found: dict[str, object]) -> Fields:
        key = found.get(self.key_column) if self.key_column else None
        for column in (self.column, self.query_column):
            if column and column not in found:
                return key, ValueError(f"no field {column!r}")
        if self.query_column is None:
            return key, found[self.column]
        return key, (found[self.query_column], found[self.column])


def _kind(path: str) -> str:
    if path == "-":
        if sys.stdin is None:
            raise UsageError("-: standard input is closed")
        return "txt"
    if not os.path.isfile(path):
        other = "is not a file; expected one, or - for standard input"
        raise UsageError(f"{path}: {other if os.path.exists(path) else 'no such file'}")
    suffixes = Path(path.removesuffix(".gz")).suffix.lower()
    kind = KINDS.get(suffixes)
    if kind is None or (kind == "parquet" and path.endswith(".gz")):
        raise UsageError(f"{path}: expected a name that ends in {', '.join(KINDS)}")
    return kind


def _bounded(lines: io.TextIOWrapper) -> Iterator[str]:
    """Lines to be parsed, none of them past LONGEST."""
    for line in iter(functools.partial(lines.readline, LONGEST), ""):
        if len(line) == LONGEST and not line.endswith(("\r", "\n")):
            raise csv.Error(f"a line of more than {LONGEST} characters")
        yield line


def _problem(value: object) -> str | None:
    """What keeps `value` from being embedded, or None."""
    if isinstance(value, tuple):  # of a pair, which is never read as one text
        return _problem(value[0]) or _problem(value[1])
    if value is None:
        return "null"
    if not isinstance(value, str):
        return f"not text but {type(value).__name__}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "invalid UTF-8"
    return None
