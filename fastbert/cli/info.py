"""`fastbert info`: what would run here, and with which launch configurations."""

from __future__ import annotations

import argparse
import json

HELP = "device, versions, backend, launch table"
DESCRIPTION = (
    "Tells what would run here: the device, versions, backend and launch configurations. "
    "Exit status: 0 done, 2 bad usage."
)
EXAMPLES = (
    "fastbert info",
    "fastbert info --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..measure.info import collect

    found = collect()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    table = found.pop("launch_table")
    found["versions"] = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    for key, value in found.items():
        print(f"{key + ':':<16}{'none' if value is None else value}")
    print(f"\nlaunch table, {found['architecture']}:")
    for row in [dict(zip(table[0], table[0], strict=True)), *table]:
        cells = list(map(str, row.values()))
        print(f"  {cells[0]:<12}{cells[1]:<24}{cells[2]:<10}" + "".join(cell.rjust(14) for cell in cells[3:]))
    return 0
