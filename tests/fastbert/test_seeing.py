"""`fastbert explain`: what tokens count, by fused and stock models; a page that needs no network, read and opened."""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert.cli.__main__ import main
from fastbert.seeing import look as looking
from fastbert.seeing.page import MOST_BYTES, color, page, shown_maps
from tests import models
from tests.test_docs import checkpoint

HOSTILE = "A <script>alert(\"x\")</script> & </SCRIPT> 'quoted' text."
TEXTS = (
    HOSTILE,
    "unbreakable" * 30 + " and words " * 60,
    "مرحبا بالعالم، هذا نص من اليمين إلى اليسار",
)


def classifier(**changes: Any) -> Any:
    sizes = {"vocab_size": 30522, "num_labels": 3, "max_position_embeddings": 512}
    model = models.seeded(bert.BertForSequenceClassification, **{**sizes, **changes})
    model.config.id2label = {0: "no", 1: "<b>maybe</b>", 2: "yes"}
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(checkpoint())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("classifier")
    classifier().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_integrated_gradients_are_stocks_and_add_up(tokenizer: Any) -> None:
    fused, stock, truth = models.three(classifier(), torch.float32)
    fastbert.fuse(fused)
    encoded = tokenizer("One text of several words.", return_tensors="pt", return_special_tokens_mask=True)
    special = encoded.pop("special_tokens_mask")[0].bool()
    call = dict(encoded)
    found = [looking._integrated_gradients(model, tokenizer, call, special, 1) for model in (fused, stock, truth)]
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0].double(), found[2][0], rtol=1e-4, atol=1e-5)
    assert found[0][1] == found[1][1]
    empty = torch.where(special, call["input_ids"], tokenizer.pad_token_id)
    with torch.no_grad():
        ends = [truth(**{**call, "input_ids": ids}).logits[0, 1].item() for ids in (call["input_ids"], empty)]
    assert found[2][0].sum().item() == pytest.approx(ends[0] - ends[1], rel=0.02)
    assert abs(ends[0] - ends[1]) > 0.1
    assert found[2][0][special].eq(0).all()


def test_what_is_looked_at(tokenizer: Any) -> None:
    model = fastbert.fuse(classifier())
    seen = looking.look(model, tokenizer, HOSTILE, layers=[1], heads=[2, 0])
    call = tokenizer(HOSTILE, return_tensors="pt")
    assert torch.equal(seen.maps[1], fastbert.attention_maps(model, call, [1], [2, 0])[1][0])
    assert "".join(before + piece for before, piece in seen.pieces) == f"[CLS] {HOSTILE} [SEP]"
    assert seen.special == [True, *[False] * (len(seen.scores) - 2), True]
    with torch.no_grad():
        logits = model(**call).logits[0]
    assert f"of the logit of {model.config.id2label[int(logits.argmax())]!r}: {logits.max():.3f}" in seen.method
    other = looking.look(model, tokenizer, HOSTILE, target=int(logits.argmin()))
    assert other.scores != seen.scores
    whole = looking.look(model.bert, tokenizer, HOSTILE)
    assert whole.scores == fastbert.attention_maps(model, call, reduce="rollout")[0, 0].tolist()
    assert "rollout" in whole.method and sum(whole.scores) == pytest.approx(1)


def test_colors() -> None:
    assert color(2.0, 2.0) == (242, 142, 43) and color(-2.0, 2.0) == (88, 140, 220)
    assert color(0.0, 2.0) == (255, 255, 255) == color(0.0, 0.0)


class Parsed(HTMLParser):
    """What a page holds, and what is open where; fails where an element is closed that isn't."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open[-1:]:
            self.words.setdefault(tag, []).append(data)


def test_the_page_holds_all_it_needs_and_texts_are_text(folder: Path, tmp_path: Path) -> None:
    file, told = tmp_path / "map.html", tmp_path / "map.json"
    given = [word for text in TEXTS for word in ("--text", text)]
    assert main(["explain", "--model", str(folder), *given, "--output", str(file), "--json", str(told)]) == 0
    text = file.read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert parsed.open == []
    assert not re.search(r"https?:|//cdn|@import|url\(", text)
    assert not [tag for tag, given in parsed.seen if {"src", "href"} & given.keys() or tag in ("link", "img", "iframe")]
    kinds = [given.get("type") for tag, given in parsed.seen if tag == "script"]
    assert kinds == ["application/json"] * len(TEXTS) + [None]
    assert [given["dir"] for tag, given in parsed.seen if given.get("class") == "text"] == ["auto"] * len(TEXTS)
    assert "script" in parsed.words["span"] and "alert" in parsed.words["span"]
    found = json.loads(told.read_text(encoding="utf-8"))
    data = [json.loads(words) for words in parsed.words["script"][:-1]]
    model = fastbert.fuse(bert.BertForSequenceClassification.from_pretrained(folder).eval())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for each, record, own in zip(data, found, TEXTS, strict=True):
        assert record["text"] == own and each["tokens"] == record["tokens"]
        assert len(record["scores"]) == len(record["tokens"]) <= 512
        maps = fastbert.attention_maps(model, tokenizer(own, return_tensors="pt", truncation=True))
        for layer, row in zip(each["layers"], each["maps"], strict=True):
            assert len(row) == len(each["heads"]) == 4
            for head, encoded in enumerate(row):
                values = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8)
                roots = maps[layer][0, head].sqrt().flatten()
                torch.testing.assert_close(values / 255, roots, rtol=0, atol=0.51 / 255)


def test_of_maps_that_are_too_many_the_means_are_shown() -> None:
    pieces = [("", "a")] * 100
    maps = {i: torch.rand(64, 100, 100) for i in range(MOST_BYTES // 640000 + 1)}
    seen = looking.Seen("a" * 100, pieces, [False] * 100, [0.5] * 100, "rollout", maps)
    means, are_means = shown_maps(seen)
    assert are_means and torch.equal(means[3][0], maps[3].mean(0))
    text = page("title", "about", [seen])
    assert "of so long a text the means over heads alone" in text and "layer 3, mean over heads" in text


QT = os.environ.get("FASTBERT_TEST_BROWSER")
"""A Python with Qt's browser: `make browser` brings it."""
QT_BROWSER = Path(__file__).parents[1] / "compat" / "qt_browser.py"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MEASURE = """<script>
const page = document.documentElement;
const boxes = [...document.querySelectorAll(".text > *")].flatMap(e => [...e.getClientRects()]);
const meet = (a, b, low, high) => Math.min(a[high], b[high]) - Math.max(a[low], b[low]) > 2;
page.dataset.wide = page.scrollWidth > window.innerWidth;
page.dataset.overlaps = boxes.filter((a, i) =>
  boxes.slice(i + 1).some(b => meet(a, b, "left", "right") && meet(a, b, "top", "bottom"))).length;
page.dataset.blank = [...document.querySelectorAll("canvas")].filter(c => {
  const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  return d.every((v, i) => i % 4 === 3 || v === d[i % 4]);
}).length;
page.dataset.right = [...document.querySelectorAll(".text")].map(e => getComputedStyle(e).direction).join(" ");
document.querySelector('button[data-layer="0"][data-head="3"]').click();
page.dataset.chosen = document.querySelector(".large h2").textContent;
</script></body>"""


@pytest.mark.skipif(QT is None and BROWSER is None, reason="no browser is installed; make browser brings one")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(width: int, folder: Path, tmp_path: Path) -> None:
    """Drawn; nothing sticks out, nothing lies over another, no map is blank, right-to-left text runs that way."""
    file = tmp_path / "map.html"
    given = [word for text in TEXTS for word in ("--text", text)]
    assert main(["explain", "--model", str(folder), *given, "--output", str(file)]) == 0
    file.write_text(file.read_text(encoding="utf-8").replace("</body>", MEASURE), encoding="utf-8")
    if QT is not None:
        command = [QT, str(QT_BROWSER), str(file), str(width)]
    else:
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
        command += ["--virtual-time-budget=10000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    given = dict(Parsed(done.stdout).seen[0][1])  # type: ignore[assignment]
    told = {name: value for name, value in dict(given).items() if name.startswith("data-")}
    assert told == {
        "data-drawn": "yes",
        "data-wide": "false",
        "data-overlaps": "0",
        "data-blank": "0",
        "data-right": "ltr ltr rtl",
        "data-chosen": "layer 0, head 3",
    }


def test_an_image(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "map.png"
    arguments = ["--text", "costs $5, or $6", "--text", TEXTS[1], "--layers", "1", "--output", str(file)]
    assert main(["explain", "--model", str(folder), *arguments]) == 0
    image = pytest.importorskip("PIL.Image")
    with image.open(file) as found:
        assert found.width == 1350 and found.height > 600
        pixels = found.convert("RGB")
    colors = {pixel for _, pixel in pixels.getcolors(1 << 20) or ()}
    assert pixels.crop((1335, 0, 1350, pixels.height)).getcolors() == [(15 * pixels.height, (255, 255, 255))]
    assert (242, 142, 43) in colors or (88, 140, 220) in colors  # of what counts most


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--output", "map.pdf"], "--output map.pdf: expected a name that ends in .html or .png"),
        (["--text", " "], "--text: it is empty; expected a text"),
        (["--layers", "one"], "--layers one: expected integers between commas, as 0,11"),
        (["--layers", "2"], "layers is [2]; expected different integers from 0 to 1"),
        (["--heads", "0,0"], "heads is [0, 0]; expected different integers from 0 to 3"),
        (["--target", "3"], "--target 3: expected a class from 0 to 2"),
        (["--output", "none/map.html"], "--output none/map.html: No such file or directory; expected a file"),
    ],
)
def test_bad_usage(
    arguments: list[str],
    told: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = ["explain", "--model", str(folder), "--text", "a text", "--output", "map.html", *arguments]
    assert main(whole) == 2
    assert f"fastbert explain: {told}" in capsys.readouterr().err
    assert not (tmp_path / "map.html").exists()


def test_a_target_of_what_gives_no_logits(tokenizer: Any) -> None:
    model = fastbert.fuse(copy.deepcopy(classifier().bert))
    with pytest.raises(Exception, match="target 1: this BertModel gives no logits of a whole text"):
        looking.look(model, tokenizer, "a text", target=1)
