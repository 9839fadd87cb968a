"""`fastbert embed`: embeddings of a corpus, in shards."""

from __future__ import annotations

import argparse
import json

from ..measure.names import DTYPES

HELP = "embed a corpus, in shards; resumes a run that was stopped"
DESCRIPTION = (
    "Embeds the texts of files and writes shards of ids and embeddings into a folder. Rows that can't "
    "be embedded, or were cut, are counted and listed in a file of their own. The same command resumes one "
    "that was stopped; under torchrun, ranks share the shards. Exit status: 0 done, 2 bad usage, 130 interrupted."
)
EXAMPLES = (
    "fastbert embed --model BAAI/bge-large-en-v1.5 --pooling cls --normalize --output out docs.jsonl more.parquet",
    "fastbert embed --model ./sentence-transformer --column body --id-column key --output out table.csv.gz",
    "fastbert embed --model cross-encoder/ms-marco-MiniLM-L6-v2 --query-column query --output scores pairs.jsonl",
    "fastbert embed --model ./multi-vector-encoder --format npy --output tokens docs.jsonl",
    "torchrun --nproc-per-node 8 -m fastbert.cli embed --model ./sentence-transformer --output out docs.jsonl",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", nargs="+", metavar="FILE", help=".txt .jsonl .csv .tsv (also .gz) .parquet; - is stdin"
    )
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="a folder, or a name on the hub")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the shards go")
    parser.add_argument("--column", default="text", help="the field that holds the text; default: text")
    parser.add_argument("--id-column", metavar="COLUMN", help="the field that holds the id; default: rows are numbered")
    parser.add_argument(
        "--query-column",
        metavar="COLUMN",
        help="the field that holds a query: --model is a CrossEncoder, and rows are scored",
    )
    parser.add_argument("--format", choices=("parquet", "npy"), default="parquet", help="default: parquet")
    parser.add_argument(
        "--pooling",
        choices=("mean", "cls", "max", "mean_sqrt_len", "lasttoken"),
        help="default: what a sentence-transformers folder says, else mean; of token vectors there is none",
    )
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, help="to length 1; default: as the folder says, else not"
    )
    parser.add_argument("--prompt", help="put before every text; default: the folder's default prompt, else none")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a text; default: the model's")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    parser.add_argument("--precision", choices=("fp8", "int8"), help="of GEMMs; default: that of the dtype")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--batch-tokens", type=int, metavar="N", help="tokens in a forward; default: 2048 on a CPU, 65536 on a GPU"
    )
    parser.add_argument(
        "--shard-rows", type=int, metavar="N", help="rows of a shard; default: 8192, or 1024 of token vectors"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise; default: 1")
    parser.add_argument("--json", action="store_true", help="tell the totals as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..embed.job import embed

    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "json", "input")}
    found = embed(arguments.input, options.pop("output"), **options)
    longest = found.pop("max_length")
    if arguments.json:
        print(json.dumps(found))
    elif not found["complete"]:
        print(f"rank {found['rank']} of {found['world']}: done in {found['seconds']:.0f} s; others are not")
    else:
        rejected, cut = found["rejected"], found["truncated"]
        told = f"{_count(rejected, 'row')} rejected, {cut:,} cut to {_count(longest, 'token')}"
        print(
            f"{_count(found['rows'], 'row')} in {_count(found['shards'], 'shard')}, "
            f"{_count(found['tokens'], 'token')}; "
            f"{f'{told} (see part-*.problems.jsonl)' if rejected or cut else 'none rejected or cut'}; "
            f"{found['seconds']:.0f} s"
        )
    return 0


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
