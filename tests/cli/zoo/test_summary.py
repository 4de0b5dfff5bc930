"""What rows say together, and how a terminal shows it."""

import io
import math
import random

import pytest
from hypothesis import given
from rich.console import Console
from rows import tables
from zoo_rows import HOSTILE, many, measured, row

from convbn_fx.cli.zoo.results import Level, Row, Status
from convbn_fx.cli.zoo.summary import Spread, Worst, explanation, is_whole, render, saved, summarize

ROWS = [
    measured("zoo:a", family="zoo.one", kept=1000, tune=500, deploy=500),
    measured("zoo:b", family="zoo.one", kept=1000, tune=600, deploy=500, gradient_error=3e-13),
    measured(
        "zoo:c",
        family="zoo.one",
        kept=1000,
        tune=900,
        deploy=900,
        fused=7,
        refused={"NOT_AFTER_CONVOLUTION": 2, "HAS_HOOKS": 1},
        output_error=4e-14,
    ),
    measured("zoo:d", family="zoo.two", batch_norms=0, fused=0, kept=1000, tune=1000, deploy=1000),
    measured("zoo:e", family="zoo.two", status=Status.FAIL, detail="wrong", refused={"HAS_HOOKS": 4}),
    row("zoo:f", family="zoo.two", status=Status.CRASH, detail="signal 11"),
]


def shown(summary, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(render(summary))
    return console.file.getvalue()


def test_the_numbers():
    summary = summarize(ROWS)
    assert summary.total.models == 6
    assert list(summary.by_status.items()) == [(Status.PASS, 4), (Status.FAIL, 1), (Status.CRASH, 1)]
    assert (summary.with_batch_norms, summary.without_batch_norms, summary.whole) == (4, 1, 2)
    assert summary.total.pairs == 37
    assert list(summary.refused.items()) == [("HAS_HOOKS", 5), ("NOT_AFTER_CONVOLUTION", 2)]
    assert summary.worst == {
        "output_error": Worst(4e-14, "zoo:c"),
        "gradient_error": Worst(3e-13, "zoo:b"),
        "float32_error_tune": Worst(1e-6, "zoo:a"),
        "float32_error_eval": Worst(2e-6, "zoo:a"),
    }


def test_the_families():
    one, two = summarize(ROWS).families
    assert (one.name, one.models, one.pairs) == ("zoo.one", 3, 27)
    assert one.saved == Spread(3, pytest.approx(0.4), pytest.approx(0.1), pytest.approx(0.5))
    assert one.tune_by_deploy == 1.0
    assert (two.name, two.models, two.pairs) == ("zoo.two", 3, 10)
    assert two.saved == Spread(1, *[pytest.approx(0.4)] * 3)  # of the model with pairs alone


def test_the_memory_of_all_models_with_pairs():
    summary = summarize(ROWS)
    assert summary.total.saved == Spread(4, pytest.approx(0.4), pytest.approx(0.1), pytest.approx(0.5))
    assert summary.total.tune_by_deploy == 1.0


def test_the_order_of_the_rows_is_nothing():
    rows = many(300)
    expected = summarize(rows)
    random.Random(0).shuffle(rows)
    assert summarize(rows) == expected
    assert summarize(iter(rows)) == expected


def test_of_equal_errors_the_first_name_is_told():
    rows = [measured(name, family=name[::-1]) for name in ("zoo:b", "zoo:a", "zoo:c")]
    assert summarize(rows).worst["output_error"].name == "zoo:a"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_the_worst(value):
    rows = [measured("zoo:a"), measured("zoo:b", output_error=value), measured("zoo:c", output_error=1e300)]
    assert summarize(rows).worst["output_error"].name == "zoo:b"


def test_not_a_number_is_worse_than_infinity():
    rows = [measured("zoo:a", output_error=math.inf), measured("zoo:b", output_error=math.nan)]
    assert summarize(rows).worst["output_error"].name == "zoo:b"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"refused": {"HAS_HOOKS": 0}}, True),
        ({"level": Level.STRUCTURE, "output_error": None}, True),
        ({"refused": {"HAS_HOOKS": 1}}, False),
        ({"refused": None}, False),
        ({"batch_norms": 0, "fused": 0}, False),
        ({"batch_norms": None}, False),
        ({"fused": None}, False),
        ({"status": Status.FAIL}, False),
    ],
)
def test_a_whole_model_passed_and_has_all_its_batch_norms_fused(values, expected):
    assert is_whole(measured("zoo:a", **values)) is expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(100, 60, 0.4), (100, 110, -0.1), (0, 0, None), (None, 1, None), (1, None, None)],
)
def test_memory_saved(before, after, expected):
    assert saved(measured("zoo:a", kept=before, tune=after)) == (expected and pytest.approx(expected))


def test_every_reason_of_the_library_has_an_explanation_and_others_have_none():
    assert explanation("HAS_HOOKS").startswith("the convolution or the batch norm has hooks")
    assert explanation("A_REASON_OF_ANOTHER_VERSION") == ""


def test_nothing_is_a_summary_too():
    summary = summarize([])
    assert summary.total.models == summary.total.pairs == summary.whole == 0
    assert not summary.by_status
    assert not summary.worst
    assert summary.total.saved is None
    assert summary.families == ()
    assert "models" in shown(summary)


def test_rows_in_which_nothing_was_measured():
    summary = summarize([Row(name=f"zoo:{status}", status=status, level=Level.NUMERIC) for status in Status])
    assert dict(summary.by_status) == dict.fromkeys(Status, 1)
    assert (summary.with_batch_norms, summary.without_batch_norms, summary.total.pairs) == (0, 0, 0)
    (family,) = summary.families
    assert (family.name, family.models, family.saved, family.tune_by_deploy) == ("", 7, None, None)
    text = shown(summary)
    assert "unbuildable" in text
    assert "by family" not in text  # no table is empty


@given(tables())
def test_any_rows_have_a_summary(rows):
    summary = summarize(rows)
    assert (
        summary.total.models
        == sum(summary.by_status.values())
        == sum(family.models for family in summary.families)
    )
    assert summary.total.pairs == sum(family.pairs for family in summary.families)
    assert summary.whole <= summary.with_batch_norms <= summary.total.models - summary.without_batch_norms
    assert shown(summary)


def test_the_terminal_shows_the_numbers():
    text = shown(summarize(ROWS))
    lines = [line.split() for line in text.splitlines()]
    assert ["models", "6"] in lines
    assert ["pass", "4"] in lines
    assert ["pass,", "every", "one", "fused", "2"] in lines
    assert ["pairs", "fused", "37"] in lines
    assert ["batch", "norms", "left", "7"] in lines
    assert ["outputs,", "float64", "4.0e-14", "zoo:c"] in lines
    one = ["zoo.one", "3", "27", "40.0", "%", "10.0", "%", "50.0", "%", "1.00"]
    assert one in lines
    assert "has hooks" in text


def test_names_are_no_markup_for_the_terminal():
    rows = [measured(f"zoo:[red]{HOSTILE}[/bold]", family="[blue]", refused={"[link=x]": 1})]
    text = "".join(shown(summarize(rows), width=400).split())
    assert "".join(f"zoo:[red]{HOSTILE}[/bold]".split()) in text
    assert "[blue]" in text
    assert "[link=x]" in text


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_narrow_terminal_loses_no_name(width):
    name = "zoo:a_model_of_a_long_name_" + "x" * 40
    text = shown(summarize([measured(name)]), width)
    assert name in "".join(line.split()[-1] for line in text.splitlines() if line.strip())
