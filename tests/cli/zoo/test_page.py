"""The page of the results as a file: what it holds, that it loads nothing, that nothing in it does harm."""

import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import pytest
from hypothesis import given
from rows import tables
from zoo_rows import HOSTILE, many, measured, row

from convbn_fx.cli.zoo.page import render_page, write_page
from convbn_fx.cli.zoo.results import Level, Row, Status
from convbn_fx.cli.zoo.summary import UNMEASURED

#: What names a thing that a browser would fetch.
FETCHING = {
    "src",
    "srcset",
    "href",
    "xlink:href",
    "data",
    "action",
    "formaction",
    "poster",
    "background",
    "ping",
}


class Document(HTMLParser):
    """The elements in their order, each with the text that stands directly in it; and the table of models."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.rows, self.models = None, None
        self.text = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.text = []
        self.elements.append((tag, dict(attributes), self.text))
        if tag == "table" and dict(attributes).get("id") == "models":
            self.models = []
        elif tag == "tr" and self.models is not None:
            self.models.append([])
        elif tag in {"td", "th"} and self.models is not None:
            self.models[-1].append((dict(attributes), self.elements[-1][2]))

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        self.text = []  # what stands between elements is of none
        if tag == "table" and self.models is not None:
            self.rows, self.models = self.models, None

    def handle_data(self, text):
        self.text.append(text)

    def all(self, tag):
        return [(attributes, "".join(text)) for each, attributes, text in self.elements if each == tag]

    @property
    def headings(self):
        return [attributes["data-key"] for attributes, _ in self.all("button") if "data-key" in attributes]

    @property
    def table(self):
        """For each model: what is shown and what is sorted by, by the column's key."""
        found, headings = {}, self.headings
        for cells in self.rows[2:]:
            shown = ["".join(text) for _, text in cells]
            values = [
                attributes.get("data-v", text) for (attributes, _), text in zip(cells, shown, strict=True)
            ]
            found[shown[0]] = dict(zip(headings, zip(shown, values, strict=True), strict=True))
        return found


def page(rows, title="All models", source="results.csv, torch 2.11"):
    return render_page(rows, title=title, source=source)


@pytest.fixture(scope="module")
def whole_zoo():
    return page(many(1400))


@pytest.fixture(scope="module")
def document(whole_zoo):
    return Document(whole_zoo)


def test_the_file_is_the_page(tmp_path):
    path = tmp_path / "docs" / "zoo.html"
    write_page(path, many(3), title="Ünïcode", source="results.csv")
    assert path.read_bytes() == page(many(3), title="Ünïcode", source="results.csv").encode()


def test_the_same_rows_give_the_same_bytes_in_any_order(whole_zoo):
    rows = many(1400)
    random.Random(0).shuffle(rows)
    assert page(rows) == whole_zoo


def test_the_template_is_part_of_the_package():
    assert (resources.files("convbn_fx.cli.zoo") / "page.html").is_file()


def test_it_is_small(whole_zoo):
    assert len(whole_zoo.encode()) < 1_000_000


def test_title_and_source():
    document = Document(page(many(2), title="A <b>title</b>", source="results.csv & torch <2.11>"))
    assert document.all("title")[0][1].strip() == "A <b>title</b>"
    assert [text.strip() for _, text in document.all("h1")] == ["A <b>title</b>"]
    footer = [index for index, element in enumerate(document.elements) if element[0] == "footer"]
    assert "".join(document.elements[footer[0] + 1][2]).startswith("Source: results.csv & torch <2.11>.")


def test_it_loads_nothing(whole_zoo, document):
    assert "http:" not in whole_zoo
    assert "https:" not in whole_zoo
    assert not re.search(
        r"url\(|@import|\bfetch\(|XMLHttpRequest|\bimport\b|WebSocket|sendBeacon|\beval\(", whole_zoo
    )
    for tag, attributes, _ in document.elements:
        assert tag not in {"iframe", "object", "embed", "img", "base"}
        for name in FETCHING & attributes.keys():
            assert attributes[name].startswith("#") or attributes[name] == "data:,", (tag, attributes)


def test_the_browser_is_told_to_load_nothing():
    (policy,) = [
        attributes["content"]
        for attributes, _ in Document(page([])).all("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize("column", ["name", "family", "input", "detail"])
def test_text_does_no_harm(column):
    rows = [replace(measured("zoo:a"), **{column: HOSTILE}), measured("zoo:b")]
    harmless = Document(page([measured("zoo:a"), measured("zoo:b")]))
    document = Document(page(rows))
    assert [tag for tag, *_ in document.elements if tag in {"script", "img"}] == ["script"]
    assert document.all("script") == harmless.all("script")
    (shown,) = [cells for name, cells in document.table.items() if name != "zoo:b"]
    assert shown["notes" if column == "detail" else column][0] == HOSTILE
    assert not any(
        attribute.startswith("on") for _, attributes, _ in document.elements for attribute in attributes
    )


def test_reasons_titles_and_sources_do_no_harm():
    document = Document(page([measured("zoo:a", refused={HOSTILE: 1})], title=HOSTILE, source=HOSTILE))
    assert [tag for tag, *_ in document.elements if tag in {"script", "img"}] == ["script"]
    assert document.all("title")[0][1] == HOSTILE


def test_what_a_model_shows():
    rows = [
        measured(
            "zoo:a",
            family="zoo.one",
            parameters=25_557_032,
            batch_norms=53,
            fused=50,
            refused={"NOT_AFTER_CONVOLUTION": 2, "HAS_HOOKS": 1},
            kept=123_456_789,
            tune=74_074_073,
            deploy=70_000_000,
            output_error=1.23e-15,
            gradient_error=0.0,
            seconds=12.34,
        )
    ]
    assert Document(page(rows)).table == {
        "zoo:a": {
            "name": ("zoo:a", "zoo:a"),
            "family": ("zoo.one", "zoo.one"),
            "status": ("pass", "pass"),
            "level": ("numeric", "numeric"),
            "parameters": ("25.6", "25557032"),
            "batch_norms": ("53", "53"),
            "fused": ("50", "50"),
            "refused": ("3", "3"),
            "bytes_eval": ("123.5", "123456789"),
            "bytes_tune": ("74.1", "74074073"),
            "bytes_deploy": ("70.0", "70000000"),
            "saved": ("40.0", "40"),
            "output_error": ("1.2e-15", "1.23e-15"),
            "gradient_error": ("0", "0"),
            "float32_error_tune": ("1.0e-06", "1e-06"),
            "float32_error_eval": ("2.0e-06", "2e-06"),
            "seconds": ("12.3", "12.34"),
            "input": ("2x3x224x224", "2x3x224x224"),
            "notes": ("1 has hooks; 2 not after convolution", "1 has hooks; 2 not after convolution"),
        }
    }


def test_what_was_not_measured_is_a_dash():
    rows = [Row(name="zoo:a", status=Status.CRASH, level=Level.NUMERIC, detail="signal 11")]
    cells = Document(page(rows)).table["zoo:a"]
    told = {"name": "zoo:a", "status": "crash", "level": "numeric", "notes": "signal 11"}
    assert {key: shown for key, (shown, _) in cells.items()} == dict.fromkeys(cells, UNMEASURED) | told


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_sorts_as_the_largest(value):
    shown = Document(page([measured("zoo:a", output_error=value)])).table["zoo:a"]["output_error"]
    assert shown == (str(value), "Infinity")


def test_every_number_is_one(document):
    text = {"name", "family", "status", "level", "input", "notes"}
    table = document.table
    assert len(table) == 1400
    for cells in table.values():
        for key in cells.keys() - text:
            shown, value = cells[key]
            if shown != UNMEASURED:
                assert math.isfinite(float(value))
                assert math.isfinite(float(shown))


def test_every_row_has_every_column(document):
    groups, *rows = document.rows
    assert {len(cells) for cells in rows} == {len(document.headings)}
    assert sum(int(attributes.get("colspan", 1)) for attributes, _ in groups) == len(document.headings)
    assert len(document.all("col")) == len(document.headings)
    assert len(set(document.headings)) == len(document.headings)


def test_ids_are_unique_and_labels_name_them(document):
    elements = document.elements
    ids = [attributes["id"] for _, attributes, _ in elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    named = [
        attributes[key].split()
        for key in ("aria-labelledby", "for")
        for _, attributes, _ in elements
        if key in attributes
    ]
    assert len(named) >= 3
    assert set().union(*named) <= set(ids)


def test_the_headline():
    rows = [*many(1400), measured("zoo:broken", refused={"HAS_HOOKS": 3}, gradient_error=0.5)]
    text = re.sub(r"<[^>]*>|\s+", " ", page(rows))
    assert " 1,401 " in text
    assert re.search(
        r"Batch norms left, and why.* 3 +has hooks +the convolution or the batch norm has hooks", text
    )
    assert re.search(r"Worst error of a gradient +5\.0e-01 ", text)


@pytest.mark.parametrize("rows", [[], [Row(name="zoo:a", status=Status.CRASH, level=Level.STRUCTURE)]])
def test_where_nothing_was_measured_there_is_no_chart(rows):
    document = Document(page(rows))
    assert not document.all("ol")
    assert len(document.table) == len(rows)


@given(tables())
def test_any_rows_make_a_page(rows):
    document = Document(page(rows))
    assert document.table.keys() == {row.name for row in rows}
    assert len(document.all("script")) == 1
    drawn = {row.family for row in rows if row.fused and row.bytes_eval and row.bytes_tune is not None}
    assert len(document.all("a")) == len(drawn)


# --- The chart ------------------------------------------------------------------------------------------------------


def bars(text):
    """Where each bar begins and how long it is, in per cent of its place; ranges are within theirs, too."""
    found = []
    for _, attributes, _ in Document(text).elements:
        if attributes.get("class") in {"bar", "range"}:
            left, width = map(float, re.findall(r"(?:left|width): ([\d.]+)%", attributes["style"]))
            assert left + width <= 100.02
            if attributes["class"] == "bar":
                found.append((left, width))
    return found


def named(text):
    """The families in the chart, as they are shown, in their order."""
    return [text for attributes, text in Document(text).all("span") if attributes.get("class") == "name"]


def of_families(*parts):
    return [
        measured(f"zoo:{index}", family=f"zoo.family_{index}", kept=10000, tune=round(10000 * (1 - part)))
        for index, part in enumerate(parts)
    ]


def test_a_bar_for_each_family_with_pairs_as_long_as_what_it_saves():
    rows = [*of_families(0.1, 0.4, 0.2), row("zoo:none", family="zoo.none")]
    text = page(rows)
    assert named(text) == ["zoo.family_1", "zoo.family_2", "zoo.family_0"]
    (zero, most), (_, middle), (_, least) = bars(text)
    assert zero == 0
    assert most == pytest.approx(4 * least, rel=0.01)
    assert middle == pytest.approx(2 * least, rel=0.01)


def test_what_keeps_more_than_before_goes_the_other_way():
    (zero, saved), (left, lost) = bars(page(of_families(0.3, -0.3)))
    assert left + lost == pytest.approx(zero)
    assert saved == pytest.approx(lost)


@pytest.mark.parametrize(
    "parts", [[0.3], [0.0], [1.0], [-0.25, 0.3], [-3.0], [0.003], [0.01 * i for i in range(90)]]
)
def test_any_families_fit_into_the_drawing(parts):
    assert len(bars(page(of_families(*parts)))) == len(parts)


def test_the_drawing_is_described(document):
    links = [attributes for attributes, _ in document.all("a")]
    assert len(links) == 25
    assert links[0]["aria-label"].startswith(links[0]["href"].removeprefix("#family=") + ": ")
    assert all(attributes["title"] == attributes["aria-label"] for attributes in links)


def test_the_range_is_drawn_where_there_is_one():
    rows = [measured("zoo:a", tune=500), measured("zoo:b", tune=700), measured("zoo:c", tune=650)]
    (described,) = [attributes["aria-label"] for attributes, _ in Document(page(rows)).all("a")]
    assert described == (
        "timm.resnet: 35.0 % saved, median of 3 models (30.0 % to 50.0 %); Tune keeps 1.08 times what Deploy keeps"
    )
    assert 'class="range"' in page(rows)
    assert 'class="range"' not in page(rows[:1])


def test_a_long_name_is_whole_in_the_table():
    name = "zoo." + "x" * 300
    text = page([measured("zoo:a", family=name)])
    assert named(text) == [name]  # which the browser cuts off where it has no room
    assert Document(text).table["zoo:a"]["family"][0] == name
