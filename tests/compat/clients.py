"""Other people's packages over fused models: they answer as over stock ones, and run fused.

    python -m tests.compat.clients [USE ...]

makes environments that have the packages (REQUIRED of environments.py), then runs every use of clients_uses.py in them,
offline, stock and fused. Prints a table, and writes it with all figures to build/clients/records.json; exit status 1
where a use doesn't agree with stock by the numerical policy, or where none of its forwards runs as it is expected to.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .clients_uses import USES
from .environments import CLIENTS, LEFT_OUT, REQUIRED, client_python, environment, library

COLUMNS = ("package", "version", "use", "agrees", "packed", "dense", "stock", "why stock")


def environment_of(package: str) -> str:
    """The first environment that has a package."""
    return next(name for name, required in REQUIRED.items() if any(r.split("==")[0] == package for r in required))


def run(name: str, uses: list[str]) -> list[dict[str, Any]]:
    """Runs uses in a process of one environment; their records."""
    file, log = CLIENTS / f"{name}.json", CLIENTS / f"{name}.log"
    file.unlink(missing_ok=True)
    command = [str(client_python(name)), str(Path(__file__).with_name("clients_uses.py")), str(file), *uses]
    variables = environment(library(), HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    with log.open("w") as output:
        done = subprocess.run(command, cwd=CLIENTS, env=variables, stdout=output, stderr=subprocess.STDOUT)
    records: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if done.returncode or len(records) < len(uses):
        raise RuntimeError(f"{name} broke off after {len(records)} uses:\n{log.read_text()[-2000:]}")
    return records


def render(records: Iterable[dict[str, Any]]) -> int:
    """Prints a line a record; returns the exit status."""
    print("|", " | ".join(COLUMNS), "|")
    print("|", " | ".join("---" for _ in COLUMNS), "|")
    status = 0
    for record in records:
        cells = {**record, "agrees": "yes" if record["agrees"] else "no"}
        cells["why stock"] = "; ".join(record.get("why stock", ()))
        print("|", " | ".join(str(cells.get(column, "-")) for column in COLUMNS), "|", flush=True)
        if "error" in record:
            print(f"  {record['error']}", flush=True)
            status = 1
    for client, asks in LEFT_OUT.items():
        print(f"| {client.replace(' ', ' | ')} | left out: it asks for {asks} | | | | | |")
    return status


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("uses", nargs="*", choices=[*USES, []], metavar="USE", help="default: all")
    wanted = parser.parse_args(arguments).uses or list(USES)
    CLIENTS.mkdir(parents=True, exist_ok=True)
    records = []
    for name in REQUIRED:
        if uses := [use for use in wanted if environment_of(USES[use].package) == name]:
            records += run(name, uses)
    (CLIENTS / "records.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return render(records)


if __name__ == "__main__":
    sys.exit(main())
