"""The folder `fastbert embed` writes: shards that are there whole or not at all, and a manifest.

`part-00000.parquet` (columns id and embedding, embeddings or score), or `part-00000.npy` with `part-00000.ids.json` (of
token vectors `part-00000.starts.npy`, too), and, where rows have problems, `part-00000.problems.jsonl`. Each is written
beside its place and moved there; last comes `part-00000.json`, with what is in the shard and hashes of its files and of
the texts it was made of. A shard without that file counts as not there. `manifest.json` holds the settings all shards
share, and at the end the totals. While a
rank writes it holds `rank-0.lock`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from ..usage import UsageError, refused

FORMATS = ("parquet", "npy")
_TOTALS = ("rows", "rejected", "truncated", "tokens")


class TokenVectors(NamedTuple):
    """Vectors of the tokens of texts, end to end."""

    vectors: np.ndarray
    """(T, H) float32."""
    starts: np.ndarray
    """(texts + 1,) int64, cumulative lengths: those of text i are `vectors[starts[i] : starts[i + 1]]`."""

    def are_finite(self) -> np.ndarray:
        """(texts,) bool: where no vector of a text holds NaN or infinity."""
        odd = np.concatenate([[0], np.cumsum(~np.isfinite(self.vectors).all(1))])
        return odd[self.starts[1:]] == odd[self.starts[:-1]]

    def of(self, texts: np.ndarray) -> TokenVectors:
        """Those of some texts, (texts,) bool."""
        if texts.all():
            return self
        lengths = np.diff(self.starts)
        return TokenVectors(self.vectors[np.repeat(texts, lengths)], np.concatenate([[0], lengths[texts].cumsum()]))


class Shards:
    """The shards of one job.

    Args:
        folder: where they are; made where it isn't.
        form: one of FORMATS.
        numbered: whether ids are numbers, not texts.
        settings: plain data that decides what the shards hold.
        makes: the name of the column of what is made.
        rank, world: of all shards those are written here whose index, modulo `world`, is `rank`.

    Raises:
        UsageError: the folder can't be written, holds shards of other settings, or is being written by this rank.
    """

    def __init__(
        self,
        folder: Path,
        form: str,
        numbered: bool,
        settings: dict[str, object],
        rank: int = 0,
        world: int = 1,
        makes: str = "embedding",
    ) -> None:
        self.folder, self.form, self.rank, self.world, self.makes = folder, form, rank, world, makes
        self._numbered = numbered
        self._lock_path = folder / f"rank-{rank}.lock"
        self._settings = json.loads(json.dumps(settings))
        with refused(f"{folder}", "output", OSError, "a folder that can be written"):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._hold()
        try:
            with refused(f"{folder}", "output", OSError):
                for left in folder.glob("*.partial"):
                    owner = re.match(r"part-(\d+)\.|manifest\.json\.(\d+)-", left.name)
                    if owner and self.is_own(int(owner[1] or owner[2])):
                        left.unlink()
                self._claim()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets others of this rank write."""
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()

    def _hold(self) -> TextIO:
        """A file locked for as long as this process lives: two of one rank would take each other's files away."""
        path = self._lock_path
        while True:
            file = open(path, "w")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise UsageError(
                    f"{self.folder}: another process, of rank {self.rank} too, writes there; expected another folder",
                    "output",
                ) from error
            except OSError:  # a file system without locks
                return file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file
            file.close()  # its holder has ended meanwhile, and removed it

    def _claim(self) -> None:
        manifest = self.folder / "manifest.json"
        holds_shards = any(self.folder.glob("part-*"))  # asked first: other ranks may be starting, too
        if not manifest.exists():
            if holds_shards:
                raise UsageError(
                    f"{self.folder}: holds shards without a manifest.json; expected an empty folder", "output"
                )
            self._put("manifest.json", _json({"settings": self._settings, "complete": False}), new=True)
        try:
            there = dict(json.loads(manifest.read_text(encoding="utf-8"))["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{manifest}: is not a manifest of `fastbert embed`; expected another folder") from error
        names = sorted(name for name in {*there, *self._settings} if there.get(name) != self._settings.get(name))
        others = {path for path in self.folder.glob("rank-*.lock") if path != self._lock_path}
        if names and self.world == 1 and not holds_shards and not others:  # left by a run that got nowhere
            self._put("manifest.json", _json({"settings": self._settings, "complete": False}))
        elif names:
            differ = "; ".join(f"{name} {there.get(name)!r}, not {self._settings.get(name)!r}" for name in names)
            raise UsageError(f"{self.folder}: holds shards made with {differ}; expected another folder", "output")

    def is_own(self, index: int) -> bool:
        """Whether a shard is written here."""
        return index % self.world == self.rank

    def committed(self, index: int) -> dict[str, Any] | None:
        """What is in a shard, or None where it is not there whole."""
        try:
            found: dict[str, Any] = json.loads((self.folder / f"part-{index:05d}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(found, dict) and all((self.folder / name).exists() for name in found.get("files", ()))
        return found if whole else None

    def commit(
        self,
        index: int,
        keys: Sequence[object],
        embeddings: np.ndarray | TokenVectors,
        problems: Sequence[dict[str, object]],
        about: dict[str, object],
    ) -> None:
        """Writes a shard: `embeddings` (n, width), or (n,), of the rows `keys`; `about` goes into its record."""
        embeddings, starts = embeddings if isinstance(embeddings, TokenVectors) else (embeddings, None)
        name = f"part-{index:05d}"
        keys = list(keys) if self._numbered else [str(key) for key in keys]
        files = {}
        with refused(f"{self.folder}", "output", OSError):
            if self.form == "parquet":
                files[f"{name}.parquet"] = _parquet(keys, self._numbered, embeddings, starts, self.makes)
            else:
                files |= {f"{name}.npy": _npy(embeddings), f"{name}.ids.json": _json(keys)}
                if starts is not None:
                    files[f"{name}.starts.npy"] = _npy(starts)
            if problems:
                lines = [json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems]
                files[f"{name}.problems.jsonl"] = "".join(lines).encode("utf-8", "backslashreplace")
            for file, data in files.items():
                self._put(file, data)
            hashes = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
            self._put(f"{name}.json", _json({"files": hashes, **about}))

    def finish(self, count: int) -> dict[str, object] | None:
        """The totals of `count` shards, put into the manifest; None while another rank's are still missing."""
        found = [self.committed(index) for index in range(count)]
        records = [each for each in found if each is not None]
        summary: dict[str, object] | None = None
        with refused(f"{self.folder}", "output", OSError):
            if len(records) == count:
                totals = {name: sum(each[name] for each in records) for name in _TOTALS}
                files = {file: digest for each in records for file, digest in each["files"].items()}
                summary = {"complete": True, "shards": count, **totals}
                self._put("manifest.json", _json({"settings": self._settings, **summary, "files": files}))
                for lock in self.folder.glob("rank-*.lock"):  # of processes that were killed
                    lock.unlink(missing_ok=True)
        return summary

    def _put(self, name: str, data: bytes, new: bool = False) -> None:
        """Writes a file so that it is there whole or not at all, and stays there; `new`: one that is there stays."""
        partial = self.folder / f"{name}.{self.rank}-{os.getpid()}.partial"
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            if new:
                os.link(partial, self.folder / name)
        except FileExistsError:
            partial.unlink()
            return
        except OSError:  # a file system without links
            new = False
        if new:
            partial.unlink()
        else:
            os.replace(partial, self.folder / name)
        with contextlib.suppress(OSError):  # where folders can't be opened
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _parquet(
    keys: list[object], numbered: bool, embeddings: np.ndarray, starts: np.ndarray | None, makes: str
) -> bytes:
    import pyarrow
    import pyarrow.parquet

    ids = pyarrow.array(keys, pyarrow.int64() if numbered else pyarrow.string())
    values = pyarrow.array(embeddings.reshape(-1))
    rows = values if embeddings.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
    if starts is not None:
        rows = pyarrow.LargeListArray.from_arrays(pyarrow.array(starts), rows)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": ids, makes: rows}), sink, compression="none")
    data: bytes = sink.getvalue().to_pybytes()
    return data
