"""What a matrix kernel does in each step of its main loop, read from the PTX it compiles to."""

from __future__ import annotations

import re
from collections import Counter, deque

_LABEL = re.compile(r"(\$?\w+):")
_INSTRUCTION = re.compile(r"(?:@!?(%?\w+)\s+)?([a-z][\w.:]*)\s*([^;]*)")
_MATRIX = re.compile(r"(wgmma)\.mma_async.*\.(m\d+n\d+k\d+)|(mma)\.sync.*\.(m\d+n\d+k\d+)|(tcgen05)\.mma")
# A conversion to or from a floating-point type; those between integers make addresses.
_CONVERSION = re.compile(r"cvt\..*\.(?:[bt]?f\d+|e\dm\d)")


def kind(operation: str, operands: str = "") -> str:
    """What an instruction is counted as."""
    if found := _MATRIX.match(operation):
        return ".".join(part for part in found.groups() if part)
    if operation.startswith("cp.async.bulk.tensor"):
        return "tma"
    if operation.startswith("cp.async.c"):
        wide = re.search(r"\],\s*(?:0x10|16)\b", operands)  # bytes
        return "other" if operation.startswith("cp.async.commit") else "cp.async.16" if wide else "cp.async"
    if _CONVERSION.match(operation):
        return "conversion"
    if found := re.match(r"(ld|st|ldmatrix|stmatrix)\b.*?(global|shared|local)", operation):
        return f"{found[1]}.{found[2]}"
    return "other"


def main_loop(ptx: str) -> dict[str, int]:
    """Instructions by kind on the shortest way around the loop that holds the most matrix instructions.

    The shortest way leaves out what only some steps do: of a persistent kernel, the epilogue of a tile. Empty where no
    loop holds one.
    """
    operations: list[tuple[str, str]] = []
    conditional: list[bool] = []
    labels: dict[str, int] = {}
    for line in ptx.splitlines():
        text = line.split("//")[0].strip().lstrip("{").strip()
        if found := _LABEL.match(text):
            labels[found[1]] = len(operations)
        elif (found := _INSTRUCTION.match(text)) and ";" in text:
            operations.append((found[2], found[3]))
            conditional.append(bool(found[1]))

    def following(i: int) -> list[int]:
        name, operands = operations[i]
        if name.split(".")[0] in ("ret", "exit") and not conditional[i]:
            return []
        if name.split(".")[0] != "bra":
            return [i + 1] if i + 1 < len(operations) else []
        target = labels[operands.strip()]
        return [target, i + 1] if conditional[i] else [target]

    def around(start: int) -> list[int]:
        """The shortest way from an instruction back to it."""
        before: dict[int, int] = {}
        queue = deque([start])
        while queue:
            i = queue.popleft()
            for each in following(i):
                if each == start:
                    way = [i]
                    while way[-1] != start:
                        way.append(before[way[-1]])
                    return way
                if each not in before:
                    before[each] = i
                    queue.append(each)
        return []

    best: Counter[str] = Counter()
    seen: set[int] = set()
    for i, (name, _) in enumerate(operations):
        if _MATRIX.match(name) and i not in seen:
            way = around(i)
            seen.update(way)
            found = Counter(kind(*operations[each]) for each in way)
            if matrix(found) > matrix(best):
                best = found
    return dict(best.most_common())


def matrix(counts: dict[str, int]) -> int:
    """How many of these are matrix instructions."""
    return sum(number for name, number in counts.items() if name.startswith(("wgmma.", "mma.", "tcgen05")))
