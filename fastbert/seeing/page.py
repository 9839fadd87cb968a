"""What was seen of texts as one page of HTML that asks for nothing from a network, or as an image."""

from __future__ import annotations

import base64
import html
import importlib.resources
import json
import string
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .look import Seen

MOST_BYTES = 12 * 2**20
"""Of the maps of a text in a page; of one with more, the means over heads are shown alone."""


def page(title: str, about: str, seen: Sequence[Seen]) -> str:
    """One page; `title` and `about` are text."""
    template = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    sections = "\n".join(_section(i, each) for i, each in enumerate(seen))
    return string.Template(template).substitute(title=html.escape(title), about=html.escape(about), sections=sections)


def color(score: float, largest: float) -> tuple[int, int, int]:
    """Of a token: from white to orange where it counts for, to blue where it counts against."""
    share = min(1.0, abs(score) / largest) if largest else 0.0
    to = (242, 142, 43) if score > 0 else (88, 140, 220)
    red, green, blue = (round(255 + (end - 255) * share) for end in to)
    return red, green, blue


def _largest(seen: Seen) -> float:
    """The score of the strongest color: special tokens, of which rollout makes most, don't count."""
    counted = [abs(score) for score, special in zip(seen.scores, seen.special, strict=True) if not special]
    return max(counted or [abs(score) for score in seen.scores])


def _section(number: int, seen: Seen) -> str:
    largest, spans = _largest(seen), []
    for (before, piece), score, special in zip(seen.pieces, seen.scores, seen.special, strict=True):
        kind, end = ('bdi class="special"', "bdi") if special else ("span", "span")  # by a bdi no direction is told
        red, green, blue = color(score, largest)
        spans.append(
            f'{html.escape(before)}<{kind} style="background: rgb({red}, {green}, {blue})" '
            f'title="{html.escape(piece)}: {score:+.4f}">{html.escape(piece)}</{end}>'
        )
    maps, means = shown_maps(seen)
    names = ["mean over heads"] if means else [f"head {i}" for i in range(next(iter(maps.values())).shape[0])]
    data = {
        "tokens": [piece for _, piece in seen.pieces],
        "layers": list(maps),
        "heads": names,
        "maps": [[_encoded(one) for one in each] for each in maps.values()],
    }
    # "<" as JSON escapes it: nothing of a text ends the element.
    told = json.dumps(data).replace("<", "\\u003c")
    heading = "".join(f'<th scope="col">{"mean" if means else i}</th>' for i in range(len(names)))
    rows = "".join(
        f'<tr><th scope="row">layer {layer}</th>'
        + "".join(
            f'<td><button type="button" data-layer="{i}" data-head="{j}" aria-pressed="false" '
            f'aria-label="layer {layer}, {name}"><canvas></canvas></button></td>'
            for j, name in enumerate(names)
        )
        + "</tr>"
        for i, layer in enumerate(maps)
    )
    note = "; of so long a text the means over heads alone" if means else ", by layer and head"
    low, high = ("rgb(88, 140, 220)", f"-{largest:.3g}") if min(seen.scores) < 0 else ("rgb(255, 255, 255)", "0")
    middle = ", rgb(255, 255, 255)" if min(seen.scores) < 0 else ""
    return f"""<section>
<h2>Text {number + 1}: how much each token counts</h2>
<p class="soft">{html.escape(seen.method)}</p>
<p class="text" dir="auto">{"".join(spans)}</p>
<div class="legend"><span>{high}</span><span class="bar" style="background: linear-gradient(to right, {low}{middle}, \
rgb(242, 142, 43))"></span><span>+{largest:.3g}</span><span>point at a token for its number</span></div>
<h2>What attends to what{note}</h2>
<div class="grid"><table><thead><tr><th></th>{heading}</tr></thead><tbody>{rows}</tbody></table></div>
<div class="large"><h2></h2><div class="scroll"><canvas></canvas></div><p class="said"></p></div>
<script type="application/json">{told}</script>
</section>"""


def shown_maps(seen: Seen) -> tuple[dict[int, Tensor], bool]:
    """The maps of a page, (heads, S, S) by layer; and whether these are means over heads, (1, S, S)."""
    if sum(each.numel() for each in seen.maps.values()) <= MOST_BYTES:
        return seen.maps, False
    return {layer: each.mean(0, keepdim=True) for layer, each in seen.maps.items()}, True


def _encoded(one: Tensor) -> str:
    """The roots of a map (S, S), 0 to 1, in bytes: of small numbers more is left."""
    values = (one.clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return base64.b64encode(values.numpy().tobytes()).decode("ascii")


_WIDTH = 9.0  # inches
_COLUMNS = 6


class _Style(NamedTuple):
    """How a piece of text is drawn in an image."""

    size: float
    weight: str = "normal"
    color: str = "black"
    behind: tuple[int, int, int] | None = None


def image(title: str, seen: Sequence[Seen], file: Path) -> None:
    """Writes a PNG, 1,350 pixels wide: tokens, and of every layer the mean over heads. Takes matplotlib.

    It draws letters one after the other, as they are in memory: for scripts from right to left take the page.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    figure = Figure((_WIDTH, 1.0), dpi=150)
    renderer = FigureCanvasAgg(figure).get_renderer()
    line, left, right = 0.24, 0.15, _WIDTH - 0.15

    def width(text: str, size: float) -> float:
        found, _, _ = renderer.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)
        return float(found) / figure.dpi

    placed: list[tuple[float, float, str, _Style]] = []
    maps: list[tuple[float, float, float, str, Tensor]] = []
    top = 0.35
    placed.append((left, top, title, _Style(12, "bold")))
    for number, each in enumerate(seen):
        largest, x = _largest(each), left
        top += 1.6 * line
        placed.append((left, top, f"Text {number + 1}", _Style(10, "bold")))
        for words in textwrap.wrap(each.method, 120):
            top += 0.8 * line
            placed.append((left, top, words, _Style(8, color="dimgrey")))
        top += 1.3 * line
        for (before, piece), score in zip(each.pieces, each.scores, strict=True):
            x += width(" ", 9) if before else 0.0
            wide, kept = width(piece, 9), piece
            while left + wide > right:  # no line holds it
                kept = kept[: min(len(kept) - 1, int(len(kept) * (right - left) / wide))]
                piece = f"{kept}\N{HORIZONTAL ELLIPSIS}"
                wide = width(piece, 9)
            if x + wide > right:
                x, top = left, top + line
            placed.append((x, top, piece, _Style(9, behind=color(score, largest))))
            x += wide + 0.03
        side = (right - left) / _COLUMNS - 0.12
        for i, (layer, found) in enumerate(each.maps.items()):
            if i % _COLUMNS == 0:
                top += 0.45 if i == 0 else side + 0.35
            maps.append((left + i % _COLUMNS * (side + 0.12), top, side, f"layer {layer}", found.mean(0)))
        top += side + 0.1
    height = top + 0.15
    figure.set_size_inches(_WIDTH, height)
    for x, y, text, style in placed:
        shown = figure.text(x / _WIDTH, 1 - y / height, text, parse_math=False, va="baseline")
        shown.set(fontsize=style.size, fontweight=style.weight, color=style.color)
        if style.behind is not None:
            red, green, blue = (part / 255 for part in style.behind)
            shown.set_bbox({"facecolor": (red, green, blue), "edgecolor": "none", "pad": 1.5})
    for x, y, side, name, mean in maps:
        axes = figure.add_axes((x / _WIDTH, 1 - (y + side) / height, side / _WIDTH, side / height))
        axes.imshow(mean.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{name}, mean over heads", fontsize=6, pad=3)
    figure.savefig(file, format="png")
