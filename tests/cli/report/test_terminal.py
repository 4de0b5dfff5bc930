"""A report in the terminal, as a picture and as a page: what it says, and that it stands alone."""

from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import matplotlib as mpl
import pytest
import torch
from models import Functional, Pair, data, prepared
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from convbn_fx import Pair as Record
from convbn_fx.cli.report.inspection import inspect_model
from convbn_fx.cli.report.plotting import inline_svg, plot
from convbn_fx.cli.report.tables import pairs, refusals, share, together, unit_of
from convbn_fx.cli.report.terminal import render, write_html

NASTY = "<script>alert('[red]$x$&')</script>"


class Network(nn.Module):
    """Two pairs, one of them twice and at risk in float16; one function; two batch norms that stay."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.add_module("block", Pair(nn.Conv2d(4, 4, 3)))
        self.add_module(NASTY, nn.BatchNorm2d(4))
        self.last = nn.BatchNorm2d(4)
        self.function = Functional(lambda m, x: m.normalize(F.conv2d(x, m.weight)), (4, 4, 1, 1), 4)

    def forward(self, x):
        x = self.block(self.block(self.stem(x)))
        x = self.function(getattr(self, NASTY)(x.relu()))
        return self.last(F.relu(x))


def network():
    model = prepared(Network(), torch.float32)
    model.block.norm.weight.data.fill_(1e7)
    return model


@pytest.fixture(scope="module")
def inspection():
    torch.manual_seed(0)
    return replace(inspect_model(network(), (torch.zeros(2, 3, 16, 16),)), model=NASTY)


class Branching(nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        return x if x.sum() > 0 else -x


@pytest.fixture(scope="module")
def others():
    """What has little to show."""
    uncounted = inspect_model(prepared(Branching(Pair())), (data(2, 3, 8, 8),))
    without_pairs = inspect_model(nn.Sequential(nn.Linear(3, 3)), (torch.zeros(2, 3),))
    nothing_kept = inspect_model(Pair().eval().requires_grad_(False), (torch.zeros(2, 3, 8, 8),))
    empty = inspect_model(nn.Identity(), (torch.zeros(2, 3),))
    dead = prepared(Pair())
    dead.norm.weight.data.zero_()
    return {
        "uncounted": uncounted,
        "without pairs": without_pairs,
        "nothing kept": nothing_kept,
        "empty": empty,
        "dead channels": inspect_model(dead, (data(2, 3, 8, 8),)),
    }


def printed(inspection, width=120):
    console = Console(file=StringIO(), width=width)
    console.print(render(inspection))
    return console.file.getvalue()


def many(inspection, count):
    """The same pairs again and again, under other names."""
    rows = [
        replace(row, pair=row.pair.prefixed(f"part{part}"))
        for part in range(count)
        for row in inspection.pairs
    ]
    return replace(inspection, pairs=rows[:count])


# --- The terminal -------------------------------------------------------------------------------------------------


def test_totals_and_pairs(inspection):
    text = printed(inspection)
    assert text.startswith(f"{NASTY}(float32[2, 3, 16, 16])\n3 pairs fused, 2 batch norms left\n")
    saved = inspection.saved
    for mode, count in (("Eval", saved.eval), ("Tune", saved.tune), ("Deploy", saved.deploy)):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{mode} ")]
        assert line.split() == [mode, f"{count / 1e3:.2f}", "kB", f"{count / saved.eval:.1%}"]
    (line,) = [line for line in text.splitlines() if line.startswith("block.conv + norm")]
    row = next(row for row in inspection.pairs if row.pair.convolution == "block.conv")
    assert line.split()[3:8] == [
        "2",
        *(f"{count / 1e3:.2f}" for count in (row.saved.eval, row.saved.tune, row.saved.deploy)),
        f"{row.saved.tune / row.saved.eval:.1%}",
    ]
    assert "Without bytes of their own: 1" in text
    assert "8 coefficients gamma / sqrt(var + eps)" in text


def test_what_was_left_and_why(inspection):
    text = printed(inspection)
    assert "2 left: NOT_AFTER_CONVOLUTION" in text
    assert "the batch norm's input is not the output of a convolution or linear layer" in text
    assert "cure: none needed: there is nothing to fold it into" in text
    assert f"of relu: {NASTY}, last" in text


def test_warnings_name_the_pair_and_the_cure(inspection):
    text = printed(inspection)
    assert "At risk in Deploy mode in float16" in text
    assert "block.conv + norm: the folded weight reaches" in text
    assert "cure: run what deploy() returns in bfloat16" in text


def test_nothing_is_said_of_what_there_is_not(others):
    assert "float16" not in printed(others["without pairs"])
    assert "left:" not in printed(others["without pairs"])
    assert "coefficients" not in printed(others["without pairs"])
    assert "Without bytes" not in printed(others["uncounted"])
    assert "Not counted: the call fails on tensors without values (DataDependentOutputException" in printed(
        others["uncounted"]
    )


@pytest.mark.parametrize("width", [40, 80, 200])
def test_any_width(inspection, others, width):
    for each in (inspection, *others.values()):
        lines = printed(each, width).splitlines()
        assert all(len(line) <= max(width, 60) for line in lines)


def test_names_are_not_repeated():
    record = Record("0.conv", "0.norm", "Conv2d", "BatchNorm2d")
    assert together(record) == "0.conv + norm"
    assert together(replace(record, batch_norm="other.norm")) == "0.conv + other.norm"
    assert together(replace(record, convolution="conv", batch_norm="bn")) == "conv + bn"


def test_units():
    assert [unit_of([0, size]) for size in (0, 999, 1000, 10**6, 5 * 10**12)] == [
        "bytes",
        "bytes",
        "kB",
        "MB",
        "GB",
    ]
    assert unit_of([]) == "bytes"
    assert share(0, 0) == "-"


def test_refusals_are_grouped(inspection):
    (refusal,) = refusals(inspection)
    assert refusal.count == 2
    assert refusal.listed == [f"of relu: {NASTY}, last"]


# --- The picture --------------------------------------------------------------------------------------------------

BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".PNG": b"\x89PNG"}


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_every_format(inspection, tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    before = dict(mpl.rcParams)
    plot(inspection, path)
    assert path.read_bytes().startswith(BEGINNINGS[suffix])
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", ["uncounted", "without pairs", "nothing kept", "empty", "dead channels"])
def test_little_to_show(others, tmp_path, name):
    plot(others[name], tmp_path / "picture.svg")
    write_html(others[name], tmp_path / "page.html")
    text = (tmp_path / "picture.svg").read_text()
    assert ("Not counted" in text) == (name == "uncounted")
    assert ("no pair was counted" in text) == (name in {"without pairs", "empty"})
    assert ("no coefficient" in text) == (name in {"without pairs", "empty", "dead channels"})


@pytest.mark.parametrize("count", [1, 60, 61, 300])
def test_names_that_can_be_read_side_by_side(inspection, count):
    svg = inline_svg(many(inspection, count))
    # The pair that is a function has no bar.
    bars = [row for row in many(inspection, count).pairs if row.saved is not None]
    named = [row for row in bars if f">{row.pair.convolution}<" in svg]
    assert len(named) == len(bars[:: -(-len(bars) // 60)])
    assert named[0] is bars[0]


def test_two_runs_draw_the_same(inspection):
    assert inline_svg(inspection) == inline_svg(inspection)


def test_the_picture_says_what_it_shows(inspection, tmp_path):
    plot(inspection, tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    for words in ("Saved for the backward pass by each pair", "Eval mode", "Tune mode", "kB", "channels"):
        assert words in text
    assert f"in Tune mode ({share(inspection.saved.tune, inspection.saved.eval)})" in text
    values = inspection.coefficients.values
    assert f"{sum(value < 0 for value in values)} negative" in text


# --- The page -----------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects the tags and the text; every tag that is opened must be closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, text):
        self.text.append(text)


@pytest.fixture(scope="module")
def page(inspection, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(inspection, path)
    return path.read_text(encoding="utf-8")


def test_the_page_stands_alone(page):
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & set(reader.tags)
    references = {
        value for name, value in reader.attributes if name in {"src", "href", "xlink:href", "srcset"}
    }
    assert all(reference.startswith("#") for reference in references)
    assert "@import" not in page
    assert all(part.startswith("#") for part in page.split("url(")[1:])
    namespaces = {value for name, value in reader.attributes if name.startswith("xmlns")}
    for namespace in namespaces:
        page = page.replace(namespace, "")
    assert "http" not in page


def test_names_are_escaped(page):
    reader = Reader(page)
    assert "".join(reader.text).count(NASTY) >= 3  # in the title, the heading and the list of what was left
    assert "<script" not in page


def test_the_page_shows_all_that_the_terminal_does(inspection, page):
    text = " ".join("".join(Reader(page).text).split())
    for row in pairs(inspection).rows:
        assert all(cell in text for cell in row)
    for words in (
        "3 pairs fused, 2 batch norms left",
        "2 left: NOT_AFTER_CONVOLUTION",
        "cure: none needed",
        "block.conv + norm: the folded weight reaches",
        "cure: run what deploy()",
        f"of relu: {' '.join(NASTY.split())}, last",
    ):
        assert words in text


def test_the_page_has_a_light_and_a_dark_form(page):
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#0a0b0c" not in page


def test_the_page_of_a_model_that_was_not_counted(others, tmp_path):
    write_html(others["uncounted"], tmp_path / "page.html")
    text = "".join(Reader((tmp_path / "page.html").read_text()).text)
    assert "Not counted: the call fails" in text
    assert "saved for backward" not in text
