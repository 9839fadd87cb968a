"""Arguments of `fastbert`, and its exit statuses: 0 done; 1 the numbers are not right, or something is slower, or
failed; 2 bad usage; 130 interrupted; 141 whoever read the output has closed it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.util
import io
import os
import select
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..version import VERSION, install
from . import UsageError, in_a_line

DTYPES = ("float32", "bfloat16", "float16")
SIZES = ("large", "base", "minilm")
PEERS = (
    "graphs",
    "graphs-pdl",
    "fp8",
    "fp8-graphs",
    "eager",
    "compile",
    "reduce-overhead",
    "max-autotune",
    "torch-varlen",
    "flash-attn",
    "onnxruntime",
    "openvino",
)
WORKLOADS = ("squad", "sentences", "search", "dense128", "dense384", "dense512", "uniform254")
EXAMPLES = {
    "verify": (
        "fastbert verify --model BAAI/bge-large-en-v1.5 --dtype bfloat16",
        "fastbert verify --model ./checkpoint --texts texts.txt --json report.json",
    ),
    "bench": (
        "fastbert bench --size base --workload squad --batch 8 32 --output records",
        "fastbert bench --train --peers compile --json -",
        "fastbert bench --compare old.json new.json",
    ),
    "profile": (
        "fastbert profile --size base --lengths 12,40,128 --compare stock",
        "fastbert profile --model ./checkpoint --train --trace trace.json --plot plots",
    ),
    "embed": (
        "fastbert embed --model BAAI/bge-large-en-v1.5 --pooling cls --normalize --output out docs.jsonl more.parquet",
        "fastbert embed --model ./sentence-transformer --column body --id-column key --output out table.csv.gz",
        "torchrun --nproc-per-node 8 -m fastbert.cli embed --model ./sentence-transformer --output out docs.jsonl",
    ),
    "tune": ("fastbert tune --size large --dtype bfloat16", "fastbert tune --model ./checkpoint --minutes 5"),
    "info": ("fastbert info", "fastbert info --json"),
}
"""Of each command, at the end of its --help."""

_PATHS = ("FILE", "DIR", "FOLDER", "PATH_OR_ID", ("OLD", "NEW"))
_COMPLETE_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}


class _PrintCompletion(argparse.Action):
    """Prints what makes a shell complete arguments, by shtab, and exits."""

    def __call__(self, own: argparse.ArgumentParser, namespace: Any, shell: Any, option: str | None = None) -> None:
        if importlib.util.find_spec("shtab") is None:
            own.error(f"--print-completion takes shtab, which is not installed: {install('completion')}")
        import shtab

        print(shtab.complete(own, shell))
        own.exit(0)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fastbert",
        description="The fused BERT encoder: is it right, is it fast, what is it.",
        epilog="Exit status: 0 done; 1 the numbers are not right, or something is slower, or failed; 2 bad usage; "
        "130 interrupted; 141 whoever read the output has closed it.",
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    top.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes arguments in this shell, and exit",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    verify = commands.add_parser(
        "verify",
        help="compare a checkpoint's fused forward with stock, layer by layer",
        description="Compares a checkpoint's fused forward with stock in float64 and stock in the same dtype. "
        "Exit status: 0 within the policy, 1 not, 2 bad usage.",
    )
    verify.add_argument("--model", required=True, metavar="PATH_OR_ID", help="a folder, or a name on the hub")
    verify.add_argument("--dtype", choices=DTYPES, help="working dtype; default: the checkpoint's")
    verify.add_argument("--texts", metavar="FILE", help="UTF-8, one text a line; default: a few of our own")
    verify.add_argument("--device", help="where fused and stock run; default: cuda where there is one, else cpu")
    verify.add_argument("--padding", choices=("packed", "dense"), help="one layout only; default: both")
    verify.add_argument("--precision", choices=("fp8",), help="in 8 bits, and what that changes in results")
    verify.add_argument("--json", metavar="FILE", help="write the report there, too; -: standard output")

    bench = commands.add_parser(
        "bench",
        help="time stock against fused, on this machine",
        description="Times stock against fused in one process, in random order, after checking both against float64. "
        "Weights are seeded; lengths are drawn from those of real text. "
        "Exit status: 0 all measured, 1 stock or fused failed, 2 bad usage, 130 interrupted.",
    )
    bench.add_argument(
        "--workload",
        nargs="+",
        choices=WORKLOADS,
        default=["squad", "search", "dense128"],
        help="question and passage in one; sentences; questions and passages; all of 128, 384, 512 tokens; "
        "lengths spread around 254; default: squad search dense128",
    )
    bench.add_argument(
        "--batch", nargs="+", type=int, metavar="N", help="sequences; default: 16 on a CPU, 128 on a GPU"
    )
    bench.add_argument("--size", nargs="+", choices=SIZES, default=["large"], help="shape of the model; default: large")
    bench.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: float32 on a CPU, bfloat16 and float16 on a GPU"
    )
    bench.add_argument("--train", action="store_true", help="time training steps, forward and backward, not forwards")
    bench.add_argument(
        "--cold", action="store_true", help="time new processes to their first result; of --peers, compile alone"
    )
    bench.add_argument("--peers", nargs="+", choices=("all", *PEERS), default=[], help="time these, too; default: none")
    bench.add_argument("--device", help="default: cuda where there is one, else cpu")
    bench.add_argument(
        "--repeats", type=int, default=20, help="timed forwards of each candidate; default: 20, least: 3"
    )
    bench.add_argument("--minutes", type=float, default=8.0, help="fewer repeats to end about then; default: 8")
    bench.add_argument("--output", metavar="DIR", help="write the records to DIR/<device>/<date>-<commit>.json")
    bench.add_argument("--json", metavar="FILE", help="write the records there, too; -: standard output")
    instead = bench.add_mutually_exclusive_group()
    instead.add_argument(
        "--report", nargs="+", metavar="FILE", help="measure nothing; render records into README.md and docs/"
    )
    instead.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="measure nothing; where did fused lose against stock, beyond the spread? Exit status 1: somewhere",
    )
    bench.add_argument(
        "--readme", metavar="FILE", default="README.md", help="the file --report changes; docs/ is beside it"
    )

    profile = commands.add_parser(
        "profile",
        help="where the time of a forward or a training step goes, by operator",
        description="Traces the fused model and tells for every operator its calls, time, share, FLOPs and bytes a "
        "second and how much of the floor that is, by ceilings measured in the same run; and host gaps, host "
        "synchronisations, tokens a second and peak memory. Exit status: 0 done, 2 bad usage, 130 interrupted.",
    )
    which = profile.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint: a folder, or a name on the hub")
    which.add_argument("--size", choices=SIZES, help="a model with seeded weights; default: large")
    batch = profile.add_mutually_exclusive_group()
    batch.add_argument("--lengths", metavar="N[,N...]", help="a batch of sequences of so many tokens, as 12,40,128")
    batch.add_argument("--workload", choices=WORKLOADS, help="a batch as `fastbert bench` has it; default: squad")
    profile.add_argument(
        "--batch", type=int, metavar="N", help="so many sequences, of the workload or of the one length of --lengths"
    )
    profile.add_argument(
        "--dtype", choices=DTYPES, help="default: the checkpoint's; of --size, float32 on a CPU, bfloat16 on a GPU"
    )
    profile.add_argument("--device", help="default: cuda where there is one, else cpu")
    profile.add_argument("--train", action="store_true", help="a training step, forward and backward, not a forward")
    profile.add_argument("--compare", choices=("stock",), help="profile stock, too, over the same weights, padded")
    profile.add_argument("--json", metavar="FILE", help="write the record there, too; -: standard output")
    profile.add_argument("--trace", metavar="FILE", help="write a Chrome trace of the fused model there")
    profile.add_argument("--plot", metavar="FOLDER", help="write roofline.png and layers.png there; takes matplotlib")

    embed = commands.add_parser(
        "embed",
        help="embed a corpus, in shards; goes on where it was stopped",
        description="Embeds the texts of files and writes shards of ids and embeddings into a folder. Rows that can't "
        "be embedded, or were cut, are counted and written aside. The same command goes on where one was stopped; "
        "under torchrun, ranks share the shards. Exit status: 0 done, 2 bad usage, 130 interrupted.",
    )
    embed.add_argument("input", nargs="+", metavar="FILE", help=".txt .jsonl .csv .tsv (also .gz) .parquet; - is stdin")
    embed.add_argument("--model", required=True, metavar="PATH_OR_ID", help="a folder, or a name on the hub")
    embed.add_argument("--output", required=True, metavar="DIR", help="where the shards go")
    embed.add_argument("--column", default="text", help="the field that holds the text; default: text")
    embed.add_argument("--id-column", metavar="COLUMN", help="the field that holds the id; default: rows are numbered")
    embed.add_argument("--format", choices=("parquet", "npy"), default="parquet", help="default: parquet")
    embed.add_argument(
        "--pooling",
        choices=("mean", "cls", "max", "mean_sqrt_len", "lasttoken"),
        help="default: what a sentence-transformers folder says, else mean",
    )
    embed.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, help="to length 1; default: as the folder says, else not"
    )
    embed.add_argument("--prompt", help="put before every text; default: the folder's default prompt, else none")
    embed.add_argument("--max-length", type=int, metavar="N", help="tokens of a text; default: the model's")
    embed.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    embed.add_argument("--device", help="default: cuda where there is one, else cpu")
    embed.add_argument(
        "--batch-tokens", type=int, metavar="N", help="tokens in a forward; default: 2048 on a CPU, 65536 on a GPU"
    )
    embed.add_argument("--shard-rows", type=int, default=8192, metavar="N", help="rows of a shard; default: 8192")
    embed.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise; default: 1")
    embed.add_argument("--json", action="store_true", help="tell the totals as JSON")

    tune = commands.add_parser(
        "tune",
        help="find launch configurations for this GPU and a model",
        description="Tries launch configurations for the kernels of a model on this machine's GPU: each is checked "
        "against float64 first, then timed; one that is faster than the shipped one beyond the spread is kept in the "
        "user's cache, where every process finds it. Exit status: 0 done, 2 bad usage, 130 interrupted, with what was "
        "found so far kept.",
    )
    which = tune.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="PATH_OR_ID", help="for the sizes of a checkpoint: a folder, or a name")
    which.add_argument("--size", choices=SIZES, help="for those of a model; default: large")
    tune.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    kind = tune.add_mutually_exclusive_group()
    kind.add_argument("--train", action="store_true", help="the kernels of the backward, too")
    kind.add_argument("--precision", choices=("fp8",), help='the products of fuse(model, precision="fp8")')
    tune.add_argument(
        "--library", action="store_true", help="PyTorch's GEMMs, too, for use after fastbert.set_batch_invariant(False)"
    )
    tune.add_argument("--minutes", type=float, default=10.0, help="stop about then; default: 10")
    tune.add_argument("--json", metavar="FILE", help="write everything that was tried there, too; -: standard output")

    info = commands.add_parser(
        "info",
        help="device, versions, backend, launch table",
        description="Tells what would run here: the device, versions, backend and launch configurations. "
        "Exit status: 0 done, 2 bad usage.",
    )
    info.add_argument("--json", action="store_true", help="the same as JSON")
    width = max(20, min(100, shutil.get_terminal_size().columns - 2))  # the last two are argparse's margin
    for name, command in commands.choices.items():
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.description = textwrap.fill(command.description or "", width)
        command.epilog = "\n  ".join(("examples:", *EXAMPLES[name]))
        for action in command._actions:
            if action.metavar in _PATHS:
                action.complete = _COMPLETE_FILES  # type: ignore[attr-defined]  # as shtab reads it
    return top


@contextlib.contextmanager
def _json_on_stdout(arguments: argparse.Namespace) -> Iterator[None]:
    """`--json -`: standard output gets the JSON alone, and what is told beside it goes to standard error."""
    if getattr(arguments, "json", None) != "-":
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "json"
        arguments.json = str(file)
        with contextlib.redirect_stdout(sys.stderr):
            yield
        if file.exists():
            print(file.read_text(encoding="utf-8"), end="")


def _is_closed(stream: Any) -> bool:
    """Whether a standard stream is a pipe, or a socket, that nobody reads any more."""
    if stream is None:
        return False
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_output() -> None:
    """Sends what an output didn't take nowhere: Python writes it once more as it ends, and would fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = parser().parse_args(argv)
    finally:  # argparse exits by itself after --help and --version
        print(end="", flush=True)
    try:
        command = importlib.import_module(f".{arguments.command}", __package__)
        with _json_on_stdout(arguments):
            status: int = command.main(arguments)
        print(end="", flush=True)
    except UsageError as error:
        print(f"fastbert {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastbert {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. argparse itself exits on arguments it refuses, with status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error has it: names may be in any script
    try:
        return _run(argv)
    except BrokenPipeError:
        if not (_is_closed(sys.stdout) or _is_closed(sys.stderr)):
            raise  # it is another pipe that broke, as one to a process that died
        _drop_output()
        return 141  # 128 + SIGPIPE, as of a program that the signal ended
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        with contextlib.suppress(OSError):  # standard error may be what is full
            print(f"fastbert: {in_a_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
