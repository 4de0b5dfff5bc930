"""The regression gate: what it lets pass, what it catches, and what it makes the baseline."""

import difflib
import io
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from rich.console import Console
from rows import FULL, tables

from convbn_fx.cli import gate
from convbn_fx.cli.gate import RULES, UNGATED, May, Outcome, judge, updated
from convbn_fx.cli.zoo import results
from convbn_fx.cli.zoo.results import COLUMNS, HEADER, Level, ResultsError, Row, Status

FAIL, IMPROVED, MISSING, NEW, PASS = (
    Outcome.FAIL,
    Outcome.IMPROVED,
    Outcome.MISSING,
    Outcome.NEW,
    Outcome.PASS,
)
EXPECTED = replace(FULL, seconds=None)
MODELS = [replace(EXPECTED, name=f"timm:{letter}") for letter in "abcde"]
CRASHED = Row(
    name="timm:c", family="timm.resnet", status=Status.CRASH, level=Level.NUMERIC, detail="signal 11"
)


def verdict(column, expected, found):
    """The verdict on a row of which one cell changed."""
    (single,) = judge([replace(FULL, **{column: found})], [replace(EXPECTED, **{column: expected})])
    assert single.name == FULL.name
    return single


def outcome(column, expected, found):
    return verdict(column, expected, found).outcome


def outcomes(verdicts):
    return {each.name: each.outcome for each in verdicts}


def varied(name, **cells):
    """All models, one of them with other cells."""
    return [replace(row, **cells) if row.name == name else row for row in MODELS]


class Gate:
    """A folder with two results files, and what the gate says about them."""

    def __init__(self, folder):
        self.actual = folder / "actual.csv"
        self.expected = folder / "expected.csv"

    def write(self, actual, expected):
        # A sweep writes the rows as they come, with seconds that are different every time.
        found = [replace(row, seconds=10.0 + place) for place, row in enumerate(actual)]
        self.actual.write_text(HEADER + "".join(map(results.line, reversed(found))), encoding="utf-8")
        results.write(self.expected, expected)

    def run(self, **options):
        """Returns the exit status and the lines."""
        out = io.StringIO()
        status = gate.run(self.actual, self.expected, **options, console=Console(file=out, width=80))
        assert out.getvalue().isascii()
        return status, out.getvalue().splitlines()

    def content(self):
        return self.expected.read_text(encoding="utf-8")


@pytest.fixture
def files(tmp_path):
    return Gate(tmp_path)


# --- The table ----------------------------------------------------------------------------------------------------


def test_every_column_is_gated_once_or_said_not_to_be():
    assert sorted([rule.column for rule in RULES] + list(UNGATED)) == sorted(COLUMNS)
    assert all(UNGATED.values())


@pytest.mark.parametrize("column", sorted(UNGATED.keys() - {"name"}))
def test_a_column_that_is_not_gated_may_be_anything(column):
    value = getattr(FULL, column)
    other = "other" if isinstance(value, str) else math.nan
    assert outcome(column, value, other) is PASS
    assert outcome(column, other, value) is PASS


#: Each gated column in both directions, in numbers that are not taken from the table.
CHANGES = [
    ("status", Status.PASS, Status.CRASH, FAIL, "status: pass expected, crash found"),
    ("status", Status.TIMEOUT, Status.PASS, IMPROVED, "status: timeout expected, pass found"),
    ("level", Level.NUMERIC, Level.STRUCTURE, FAIL, "level: numeric expected, structure found"),
    ("level", Level.STRUCTURE, Level.NUMERIC, FAIL, "level: structure expected, numeric found"),
    ("family", "timm.a", "timm.b", FAIL, "family: timm.a expected, timm.b found"),
    ("family", "timm.b", "timm.a", FAIL, "family: timm.b expected, timm.a found"),
    ("parameters", 25557032, 25557033, FAIL, "parameters: 25557032 expected, 25557033 found"),
    ("parameters", 25557032, 25557031, FAIL, "parameters: 25557032 expected, 25557031 found"),
    ("batch_norms", 54, 55, FAIL, "batch_norms: 54 expected, 55 found"),
    ("batch_norms", 54, 53, FAIL, "batch_norms: 54 expected, 53 found"),
    ("fused", 53, 52, FAIL, "fused: 53 expected, 52 found"),
    ("fused", 53, 54, IMPROVED, "fused: 53 expected, 54 found"),
    ("refused", {"SHARED": 1}, {"SHARED": 2}, FAIL, "refused SHARED: 1 expected, 2 found"),
    ("refused", {"SHARED": 2}, {"SHARED": 1}, IMPROVED, "refused SHARED: 2 expected, 1 found"),
    ("input", "2x3x8x8", "2x3x9x9", FAIL, "input: 2x3x8x8 expected, 2x3x9x9 found"),
    ("input", "2x3x9x9", "2x3x8x8", FAIL, "input: 2x3x9x9 expected, 2x3x8x8 found"),
    ("bytes_eval", 200000, 204000, FAIL, "bytes_eval: 200000 expected, 204000 found"),
    ("bytes_eval", 200000, 196000, FAIL, "bytes_eval: 200000 expected, 196000 found"),
    ("bytes_tune", 120000, 122400, FAIL, "bytes_tune: 120000 expected, 122400 found"),
    ("bytes_tune", 120000, 117600, IMPROVED, "bytes_tune: 120000 expected, 117600 found"),
    ("bytes_deploy", 100000, 102000, FAIL, "bytes_deploy: 100000 expected, 102000 found"),
    ("bytes_deploy", 100000, 98000, IMPROVED, "bytes_deploy: 100000 expected, 98000 found"),
    ("output_error", 3e-15, 3e-14, FAIL, "output_error: 3.00e-15 expected, 3.00e-14 found"),
    ("output_error", 3e-14, 3e-15, IMPROVED, "output_error: 3.00e-14 expected, 3.00e-15 found"),
    ("gradient_error", 2e-14, 2e-13, FAIL, "gradient_error: 2.00e-14 expected, 2.00e-13 found"),
    ("gradient_error", 2e-13, 2e-14, IMPROVED, "gradient_error: 2.00e-13 expected, 2.00e-14 found"),
    ("float32_error_tune", 2e-6, 2e-5, FAIL, "float32_error_tune: 2.00e-06 expected, 2.00e-05 found"),
    ("float32_error_tune", 2e-5, 2e-6, IMPROVED, "float32_error_tune: 2.00e-05 expected, 2.00e-06 found"),
]


def test_every_rule_is_tried_in_both_directions():
    assert [change[0] for change in CHANGES] == [rule.column for rule in RULES for _ in range(2)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[4])
def test_a_changed_column_is_caught(change):
    column, expected, found, result, difference = change
    caught = verdict(column, expected, found)
    assert (caught.outcome, caught.differences) == (result, (difference,))
    assert outcome(column, found, found) is PASS
    assert outcome(column, expected, expected) is PASS


NUMBERS = [rule for rule in RULES if isinstance(getattr(FULL, rule.column), (int, float))]


def moved(rule, sign, share):
    """The full row's number, moved by a share of what the rule tolerates."""
    factor = 1 + (float(rule.factor) - 1) * share if rule.factor > 1 else 1.01
    value = getattr(FULL, rule.column)
    number = value * factor if sign > 0 else value / factor
    return number if isinstance(value, float) else (math.ceil if sign > 0 else math.floor)(number)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rule", NUMBERS, ids=lambda rule: rule.column)
def test_a_number_moves_as_its_rule_says(rule, sign):
    value = getattr(FULL, rule.column)
    beyond = outcome(rule.column, value, moved(rule, sign, 1.1))
    assert beyond is (IMPROVED if sign == rule.may else FAIL)
    if rule.factor > 1:
        assert outcome(rule.column, value, moved(rule, sign, 0.9)) is PASS


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if rule not in NUMBERS], ids=lambda rule: rule.column
)
def test_what_is_no_number_has_no_tolerance(rule):
    assert (rule.factor, rule.floor) == (1, 0)
    assert rule.may is (May.FALL if rule.column == "refused" else May.STAY)


@pytest.mark.parametrize("expected", Status)
@pytest.mark.parametrize("found", Status)
def test_only_passing_is_better(expected, found):
    best = IMPROVED if found is Status.PASS else FAIL
    assert outcome("status", expected, found) is (PASS if expected is found else best)


REFUSALS = {
    "a reason more": ({}, {"SHARED": 1}, FAIL, ["SHARED: 0 expected, 1 found"]),
    "a reason less": ({"SHARED": 1}, {}, IMPROVED, ["SHARED: 1 expected, 0 found"]),
    "another reason": (
        {"SHARED": 1},
        {"HAS_HOOKS": 1},
        FAIL,
        ["HAS_HOOKS: 0 expected, 1 found", "SHARED: 1 expected, 0 found"],
    ),
    "fewer in all, one reason more often": (
        {"SHARED": 9, "HAS_HOOKS": 1},
        {"SHARED": 1, "HAS_HOOKS": 2},
        FAIL,
        ["HAS_HOOKS: 1 expected, 2 found", "SHARED: 9 expected, 1 found"],
    ),
    "none is zero": ({"SHARED": 0}, {"HAS_HOOKS": 0}, PASS, []),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_compared_by_reason(case):
    expected, found, result, differences = REFUSALS[case]
    caught = verdict("refused", expected, found)
    assert caught.outcome is result
    assert list(caught.differences) == [f"refused {difference}" for difference in differences]


#: Column, expected, found, the outcome, and the outcome the other way round.
EXTREMES = {
    "NaN is worse than a number": ("output_error", 1e-15, math.nan, FAIL, IMPROVED),
    "infinity is worse than a number": ("gradient_error", 1e-15, math.inf, FAIL, IMPROVED),
    "NaN is worse than infinity": ("output_error", math.inf, math.nan, FAIL, IMPROVED),
    "NaN is as bad as NaN": ("output_error", math.nan, math.nan, PASS, PASS),
    "infinity is as bad as infinity": ("output_error", math.inf, math.inf, PASS, PASS),
    "noise under the floor": ("output_error", 0.0, 1e-16, PASS, PASS),
    "noise about the floor": ("output_error", 6e-17, 5e-16, PASS, PASS),
    "a zero that is gone": ("output_error", 0.0, 6e-16, FAIL, IMPROVED),
    "noise in float32": ("float32_error_tune", 0.0, 2e-7, PASS, PASS),
    "a zero that is gone in float32": ("float32_error_tune", 0.0, 6e-7, FAIL, IMPROVED),
    "no bytes": ("bytes_tune", 0, 1, FAIL, IMPROVED),
    "one of many bytes": ("bytes_tune", 10**40, 10**40 + 1, PASS, PASS),
    "one of many parameters": ("parameters", 10**40, 10**40 + 1, FAIL, FAIL),
    "one of more parameters than a float holds": ("parameters", 10**400, 10**400 + 1, FAIL, FAIL),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_extremes(case):
    column, expected, found, result, reverse = EXTREMES[case]
    assert outcome(column, expected, found) is result
    assert outcome(column, found, expected) is reverse


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.column)
def test_an_empty_cell_is_not_gated_and_one_that_became_empty_is_lost(rule):
    full = getattr(FULL, rule.column)
    empty = "" if isinstance(full, str) else None
    assert outcome(rule.column, empty, full) is PASS
    assert outcome(rule.column, empty, empty) is PASS
    lost = verdict(rule.column, full, empty)
    assert lost.outcome is FAIL
    assert lost.differences == (f"not measured any more: {rule.column}",)


def test_none_refused_is_not_empty():
    assert outcome("refused", {}, {"SHARED": 1}) is FAIL
    assert outcome("refused", {}, None) is FAIL
    assert outcome("refused", None, {"SHARED": 1}) is PASS


# --- Models -------------------------------------------------------------------------------------------------------


def test_one_worse_column_outweighs_all_better_ones():
    found = replace(FULL, fused=54, bytes_tune=100, output_error=3e-13, gradient_error=0.0)
    (caught,) = judge([found], [EXPECTED])
    assert caught.outcome is FAIL
    assert [difference.partition(":")[0] for difference in caught.differences] == [
        "fused",
        "bytes_tune",
        "output_error",
        "gradient_error",
    ]


def test_a_crash_is_told_with_its_reason_and_what_it_lost():
    measured = [rule.column for rule in RULES if rule.column not in ("status", "level", "family")]
    (caught,) = judge([CRASHED], [replace(EXPECTED, name="timm:c")])
    assert caught.outcome is FAIL
    assert caught.differences == (
        "status: pass expected, crash (signal 11) found",
        f"not measured any more: {', '.join(measured)}",
    )
    (caught,) = judge([replace(EXPECTED, name="timm:c")], [CRASHED])
    assert caught.outcome is IMPROVED
    (caught,) = judge([replace(CRASHED, detail="signal 9")], [CRASHED])
    assert caught.outcome is PASS


def test_models_that_came_and_went():
    old, same, new = MODELS[:3]
    verdicts = judge([replace(new, status=Status.ERROR, detail="oh"), same], [same, old])
    assert [(each.name, each.outcome) for each in verdicts] == [
        ("timm:a", MISSING),
        ("timm:b", PASS),
        ("timm:c", NEW),
    ]
    assert [each.differences for each in verdicts] == [
        ("status: pass expected, no row found",),
        (),
        ("status: no row expected, error (oh) found",),
    ]


@given(tables())
def test_any_rows_are_what_they_are(table):
    verdicts = judge(table, table)
    assert [each.name for each in verdicts] == sorted(row.name for row in table)
    assert all(each.outcome is PASS and not each.differences for each in verdicts)


@given(tables(), tables())
def test_an_update_is_a_fixed_point(actual, expected):
    baseline = updated(actual, expected)
    assert [row.name for row in baseline] == sorted(row.name for row in actual)
    assert all(each.outcome is PASS for each in judge(actual, baseline))
    assert list(map(results.line, updated(actual, baseline))) == list(map(results.line, baseline))


@given(tables(), tables())
def test_an_update_takes_what_did_not_pass_and_keeps_the_rest(actual, expected):
    baseline = {row.name: row for row in updated(actual, expected)}
    found, kept = ({row.name: row for row in table} for table in (actual, expected))
    for name, result in outcomes(judge(actual, expected)).items():
        if result is PASS:
            assert baseline[name] is kept[name]
        elif result is not MISSING:
            assert results.line(baseline[name]) == results.line(replace(found[name], seconds=None))


# --- The command --------------------------------------------------------------------------------------------------


def test_an_untouched_state_passes_again_and_again(files):
    files.write(MODELS, MODELS)
    before = files.expected.stat()
    for update in (False, False, True, True):
        assert files.run(update=update) == (0, ["5 models: 5 PASS"])
    after = files.expected.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


CAUGHT = {
    "one pair lost": ({"fused": 52}, "FAIL      timm:c  fused: 53 expected, 52 found"),
    "an error grown tenfold": (
        {"gradient_error": 2e-13},
        "FAIL      timm:c  gradient_error: 2.00e-14 expected, 2.00e-13 found",
    ),
    "bytes grown by 2%": (
        {"bytes_tune": 122400},
        "FAIL      timm:c  bytes_tune: 120000 expected, 122400 found",
    ),
    "a pair won": ({"fused": 54}, "IMPROVED  timm:c  fused: 53 expected, 54 found"),
    "two columns": (
        {"fused": 52, "refused": {"SHARED": 1, "NOT_AFTER_CONVOLUTION": 1}},
        "FAIL      timm:c  fused: 53 expected, 52 found; refused SHARED: 0 expected, 1 found",
    ),
}


@pytest.mark.parametrize("case", CAUGHT)
def test_one_changed_model_is_named(files, case):
    cells, line = CAUGHT[case]
    files.write(varied("timm:c", **cells), MODELS)
    before = files.content()
    word = line.split()[0]
    assert files.run() == (
        1,
        [
            line,
            f"5 models: 4 PASS, 1 {word}",
            "To expect what was found from now on:",
            f"  convbn-fx gate {files.actual} --expected {files.expected} --update",
        ],
    )
    assert files.content() == before


def test_every_outcome_is_counted_and_what_changed_is_aligned(files):
    found = [*varied("timm:a", fused=54)[:2], CRASHED, replace(EXPECTED, name="timm:longer_name")]
    files.write(found, [*MODELS[:3], MODELS[4]])
    status, lines = files.run()
    assert status == 1
    assert [line[:28] for line in lines[:4]] == [
        "IMPROVED  timm:a            ",
        "FAIL      timm:c            ",
        "MISSING   timm:e            ",
        "NEW       timm:longer_name  ",
    ]
    assert all(line[28] != " " for line in lines[:4])
    assert lines[4] == "5 models: 1 PASS, 1 IMPROVED, 1 FAIL, 1 MISSING, 1 NEW"


def test_nothing_is_interpreted_wrapped_or_printed_raw(files):
    name = "timm:[red]x[/red]:smile:\u96ea"
    detail = "a\x1b[31m\x07 caf\u00e9 " + "and so on " * 50
    row = replace(CRASHED, name=name, detail=detail.strip())
    files.write([row], [replace(row, status=Status.PASS, detail="")])
    _, (line, *_) = files.run()
    assert line == (
        "FAIL      timm:[red]x[/red]:smile:\\u96ea  "
        f"status: pass expected, crash (a\\x1b[31m\\x07 caf\\xe9 {'and so on ' * 50}".rstrip()
        + ") found"
    )


def test_a_terminal_gets_the_same_words(files):
    files.write(varied("timm:c", fused=1), MODELS)
    out = io.StringIO()
    console = Console(file=out, width=20, force_terminal=True, color_system="truecolor")
    gate.run(files.actual, files.expected, console=console)
    assert out.getvalue().splitlines() == files.run()[1]


def arguments(lines):
    """What follows the program's name in the command that was printed."""
    program, command, *rest = shlex.split(lines[-1])
    assert (program, command) == ("convbn-fx", "gate")
    return rest


def test_the_command_is_quoted_for_a_shell(tmp_path):
    folder = tmp_path / "it's $HOME; a folder"
    folder.mkdir()
    files = Gate(folder)
    files.write(varied("timm:c", fused=1), MODELS)
    assert arguments(files.run()[1]) == [str(files.actual), "--expected", str(files.expected), "--update"]
    assert arguments(files.run(match="*:[c d]*")[1])[-3:] == ["--update", "--match", "*:[c d]*"]


def test_match_limits_both_files(files):
    models = [*MODELS, replace(EXPECTED, name="torchvision:a")]
    files.write([replace(row, fused=1) for row in models[:4]], models)
    assert files.run(match="timm:a")[1][1] == "1 model: 1 FAIL"
    assert files.run(match="a")[1][2] == "2 models: 1 FAIL, 1 MISSING"
    assert files.run(match="[de]")[1][2] == "2 models: 1 FAIL, 1 MISSING"
    assert files.run(match="torchvision:*")[1][1] == "1 model: 1 MISSING"
    assert files.run(match="*:*")[1][-3] == "6 models: 4 FAIL, 2 MISSING"


def test_match_limits_the_update(files):
    files.write([*varied("timm:a", fused=1)[:4], replace(EXPECTED, name="timm:f")], MODELS)
    before = files.content().splitlines()
    assert files.run(match="[!b-f]", update=True)[0] == 0
    after = files.content().splitlines()
    assert after[0] == before[0]
    assert after[1] == before[1].replace(",54,53,", ",54,1,")
    assert after[2:] == before[2:]
    assert files.run(match="e", update=True)[0] == 0
    assert files.content().splitlines() == after[:-1]
    assert files.run()[1][1] == "5 models: 4 PASS, 1 NEW"


# --- Updating -----------------------------------------------------------------------------------------------------


def diff(before, after):
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in lines if line[0] in "+-" and line[1:3] not in ("++", "--")]


def test_an_update_writes_only_what_changed(files):
    noisy = [
        replace(row, bytes_tune=120500, output_error=5e-14, detail="other words", float32_error_eval=1e-3)
        for row in MODELS
    ]
    found = [noisy[0], replace(noisy[1], fused=54), *noisy[3:], replace(EXPECTED, name="timm:aa")]
    files.write(found, MODELS)
    before = files.content()
    status, lines = files.run(update=True)
    assert status == 0
    assert lines[-2:] == [
        "6 models: 3 PASS, 1 IMPROVED, 1 MISSING, 1 NEW",
        f"{files.expected}: 1 model replaced, 1 added, 1 removed",
    ]
    new = [results.line(replace(row, seconds=None)).strip() for row in (found[-1], found[1])]
    old = [results.line(row).strip() for row in MODELS[1:3]]
    assert diff(before, files.content()) == [f"-{old[0]}", f"-{old[1]}", f"+{new[0]}", f"+{new[1]}"]
    assert files.content().splitlines()[1:] == sorted(files.content().splitlines()[1:])
    assert files.run() == (0, ["5 models: 5 PASS"])


def test_noise_does_not_add_up_over_many_updates(files):
    """Each step is within the tolerance of the one before; the third is beyond that of the baseline."""
    results.write(files.expected, MODELS)
    statuses = []
    for step in range(1, 4):
        files.write(varied("timm:a", bytes_tune=120000 + 500 * step), results.read(files.expected))
        statuses.append(files.run()[0])
        if not statuses[-1]:
            assert files.run(update=True)[0] == 0
    assert statuses == [0, 0, 1]


def test_updates_of_different_models_change_different_lines(files):
    files.write(MODELS, MODELS)
    base = files.content().splitlines()
    files.write(varied("timm:b", fused=54), MODELS)
    files.run(update=True)
    ours = files.content().splitlines()
    files.write(varied("timm:d", fused=55), MODELS)
    files.run(update=True)
    theirs = files.content().splitlines()
    merged = [a if a != o else b for o, a, b in zip(base, ours, theirs, strict=True)]
    assert sum(o != a for o, a in zip(base, ours, strict=True)) == 1
    assert sum(o != b for o, b in zip(base, theirs, strict=True)) == 1
    files.expected.write_text("\n".join(merged) + "\n", encoding="utf-8")
    assert [row.fused for row in results.read(files.expected)] == [53, 54, 53, 55, 53]


def test_an_update_says_what_it_expects_to_go_wrong(files):
    found = [*MODELS[:2], CRASHED, replace(MODELS[3], status=Status.TIMEOUT), MODELS[4]]
    files.write(
        found, [replace(row, status=Status.MEMORY) if row.name == "timm:b" else row for row in MODELS]
    )
    status, lines = files.run(update=True)
    assert status == 0
    assert lines[-2:] == [
        f"{files.expected}: 3 models replaced, 0 added, 0 removed",
        "2 models expected not to pass from now on: timm:c timm:d",
    ]
    assert not any("convbn-fx gate" in line for line in lines)
    assert "signal 11" in files.content()
    assert files.run() == (0, ["5 models: 5 PASS"])


def test_a_baseline_is_made_where_there_is_none(files):
    files.write(MODELS, [])
    assert files.run()[1][-3] == "5 models: 5 NEW"
    files.expected.unlink()
    with pytest.raises(ResultsError, match=r"expected\.csv: cannot be read"):
        files.run()
    assert not files.expected.exists()
    assert files.run(update=True)[0] == 0
    assert files.content() == HEADER + "".join(map(results.line, MODELS))
    assert files.run()[0] == 0


def test_a_baseline_that_cannot_be_written_is_named(files, monkeypatch):
    files.write(MODELS[:1], [])
    monkeypatch.setattr(results, "write", lambda *args: os.close(-1))
    with pytest.raises(ResultsError, match=r"expected\.csv: cannot be written: "):
        files.run(update=True)


# --- What cannot be used ------------------------------------------------------------------------------------------

GOOD = HEADER + "".join(map(results.line, MODELS))
SHORT = HEADER + "timm:a,pass\n"
BAD_CELL = HEADER + results.line(MODELS[0]).replace(",53,", ",many,")

#: What is in the file, the line at fault, and a word of the message.
UNUSABLE = {
    "not there": (None, "", "cannot be read"),
    "a folder": ("folder", "", "cannot be read"),
    "not UTF-8": (GOOD.encode() + b"caf\xe9\n", "", "cannot be read"),
    "empty": (b"", "", "is empty"),
    "a truncated last line": (GOOD[:-1].encode(), ":6", "truncated"),
    "too few cells": (SHORT.encode(), ":2", "2 cells instead of 18"),
    "an unknown column": (GOOD.replace("level", "lvl").encode(), ":1", "unknown column 'lvl'"),
    "a missing column": (GOOD.replace(",level", "").encode(), ":1", "column 'level' is missing"),
    "a model twice": ((GOOD + results.line(MODELS[2])).encode(), ":7", "timm:c is there already, at line 4"),
    "a cell that makes no sense": (BAD_CELL.encode(), ":2", "column fused: 'many' makes no sense"),
}


def spoil(path, content):
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("which", ["actual", "expected"])
@pytest.mark.parametrize("case", UNUSABLE)
def test_a_file_that_cannot_be_used_is_named_with_its_line(files, case, which):
    content, line, message = UNUSABLE[case]
    files.write(MODELS, MODELS)
    path = getattr(files, which)
    spoil(path, content)
    with pytest.raises(ResultsError) as caught:
        files.run()
    assert str(caught.value).startswith(f"{path}{line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("case", sorted(UNUSABLE.keys() - {"not there", "a folder"}))
def test_a_baseline_that_cannot_be_used_is_not_overwritten(files, case):
    files.write(MODELS, MODELS)
    spoil(files.expected, UNUSABLE[case][0])
    with pytest.raises(ResultsError, match=UNUSABLE[case][2]):
        files.run(update=True)
    assert files.expected.read_bytes() == UNUSABLE[case][0]


def test_a_folder_is_no_baseline_to_make(files):
    files.write(MODELS, MODELS)
    spoil(files.expected, "folder")
    with pytest.raises(ResultsError, match="cannot be read"):
        files.run(update=True)


def test_a_gate_that_judges_nothing_does_not_pass(files):
    files.write([], [])
    with pytest.raises(ResultsError, match="there is nothing to judge"):
        files.run()
    with pytest.raises(ResultsError, match="there is nothing to judge"):
        files.run(update=True)
    files.write(MODELS, MODELS)
    for pattern in ("timm", "TIMM:A", "", "timm:a "):
        with pytest.raises(ResultsError, match="there is nothing to judge") as caught:
            files.run(match=pattern)
        assert repr(pattern) in str(caught.value)


def test_an_empty_sweep_has_lost_every_model(files):
    files.write([], MODELS)
    status, lines = files.run()
    assert (status, lines[5]) == (1, "5 models: 5 MISSING")


# --- The command line ---------------------------------------------------------------------------------------------


def program(*args):
    command = [sys.executable, "-m", "convbn_fx", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_printed_command_mends_the_gate(files):
    files.write(varied("timm:c", fused=54), MODELS)
    judged = program("gate", files.actual, "--expected", files.expected, "--match", "[cd]")
    assert (judged.returncode, judged.stderr) == (1, "")
    lines = judged.stdout.splitlines()
    assert lines[:2] == [
        "IMPROVED  timm:c  fused: 53 expected, 54 found",
        "2 models: 1 PASS, 1 IMPROVED",
    ]
    mended = program("gate", *arguments(lines))
    assert (mended.returncode, mended.stderr) == (0, "")
    held = program("gate", files.actual, "--expected", files.expected)
    assert (held.returncode, held.stdout, held.stderr) == (0, "5 models: 5 PASS\n", "")


def test_a_pattern_that_matches_nothing_exits_with_2(files):
    files.write(MODELS, MODELS)
    result = program("gate", files.actual, "--expected", files.expected, "--match", "resnet*")
    assert (result.returncode, result.stdout) == (2, "")
    assert "'resnet*'" in result.stderr
    assert "Traceback" not in result.stderr
