"""The regression gate: what a sweep found, held against what is expected of every model.

Both are results files; the expected one, the *baseline*, is kept under version control. As in PyTorch's
`check_accuracy.py`, an improvement breaks the gate too: the baseline has to be updated on purpose, by the command that
the gate prints, so that what was won once cannot be lost unseen.
"""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from enum import IntEnum, StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from convbn_fx.cli.zoo import results
from convbn_fx.cli.zoo.results import ResultsError, Row, Status, matches


class May(IntEnum):
    """In which direction a number may move without being worse; the value is the sign of that move."""

    FALL = -1
    STAY = 0
    RISE = 1


class Rule(NamedTuple):
    """How a column may change.

    Attributes:
        column: Its name.
        may: Where it may move to; a text or a number that may only stay is worse for every change.
        factor: A number that grew or shrank by no more than this factor is where it was.
        floor: A number below this one counts as this one.
        best: The one value that is an improvement over all others, of a column that may only stay.
    """

    column: str
    may: May
    factor: int | Fraction = 1
    floor: float = 0.0
    best: str | None = None


_PERCENT = Fraction(101, 100)
# Rounding errors move by some factor with the machine and the order of its sums; below half a unit in the last place
# they are nothing but noise.
_NOISE = 5
_FLOAT64 = 2.0**-53
_FLOAT32 = 2.0**-24

#: The gated columns, in the order in which differences are told.
RULES: tuple[Rule, ...] = (
    Rule("status", May.STAY, best=Status.PASS),
    Rule("level", May.STAY),
    Rule("family", May.STAY),
    Rule("parameters", May.STAY),
    Rule("batch_norms", May.STAY),
    Rule("fused", May.RISE),
    Rule("refused", May.FALL),
    Rule("input", May.STAY),
    Rule("bytes_eval", May.STAY, _PERCENT),
    Rule("bytes_tune", May.FALL, _PERCENT),
    Rule("bytes_deploy", May.FALL, _PERCENT),
    Rule("output_error", May.FALL, _NOISE, _FLOAT64),
    Rule("gradient_error", May.FALL, _NOISE, _FLOAT64),
    Rule("float32_error_tune", May.FALL, _NOISE, _FLOAT32),
)

#: The columns that are not gated, and why.
UNGATED: Mapping[str, str] = {
    "name": "it says which rows belong together",
    "float32_error_eval": "the model's own rounding, where the pass has no part: the machine's and PyTorch's to change",
    "seconds": "the machine's; a baseline leaves it empty",
    "detail": "the words of an exception, which may name addresses and versions",
}


class Outcome(StrEnum):
    """What a model's row is, held against the one that is expected; of two, the later one counts."""

    PASS = "PASS"  # noqa: S105 - no password
    IMPROVED = "IMPROVED"
    FAIL = "FAIL"
    MISSING = "MISSING"
    NEW = "NEW"


class Verdict(NamedTuple):
    """The gate's verdict on one model.

    Attributes:
        name: The model.
        outcome: `PASS` if every gated column is what is expected; `FAIL` if one is worse, whatever the others are;
            `IMPROVED` if some are better and none is worse; `MISSING` if the model is expected and was not measured;
            `NEW` if it was measured and is not expected.
        differences: What changed, such as `fused: 53 expected, 52 found`.
    """

    name: str
    outcome: Outcome
    differences: tuple[str, ...] = ()


def judge(actual: list[Row], expected: list[Row]) -> list[Verdict]:
    """A verdict for every model of either, sorted by name; both have one row a model."""
    found, wanted = ({row.name: row for row in rows} for rows in (actual, expected))
    return [
        _verdict(name, found.get(name), wanted.get(name)) for name in sorted(found.keys() | wanted.keys())
    ]


def _verdict(name: str, found: Row | None, expected: Row | None) -> Verdict:
    if found is None or expected is None:
        outcome = Outcome.NEW if expected is None else Outcome.MISSING
        return Verdict(name, outcome, (f"status: {_status(expected)} expected, {_status(found)} found",))
    outcomes, differences, lost = [Outcome.PASS], [], []
    for rule in RULES:
        before, now = getattr(expected, rule.column), getattr(found, rule.column)
        if _empty(before):
            continue
        if _empty(now):
            lost.append(rule.column)
            continue
        for label, value, other in _parts(rule.column, before, now):
            outcome = _outcome(rule, value, other)
            if outcome is not Outcome.PASS:
                outcomes.append(outcome)
                told = _status(found) if rule.column == "status" else _text(other)
                differences.append(f"{label}: {_text(value)} expected, {told} found")
    if lost:
        outcomes.append(Outcome.FAIL)
        differences.append(f"not measured any more: {', '.join(lost)}")
    return Verdict(name, max(outcomes, key=list(Outcome).index), tuple(differences))


def _status(row: Row | None) -> str:
    if row is None:
        return "no row"
    return f"{row.status} ({row.detail})" if row.detail else str(row.status)


def _empty(value: Any) -> bool:
    return value is None or value == ""


def _text(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)


def _parts(column: str, expected: Any, found: Any) -> Iterator[tuple[str, Any, Any]]:
    """What is compared one by one: the two values, or the two counts of every key."""
    if not isinstance(expected, Mapping):
        yield column, expected, found
        return
    for key in sorted(expected.keys() | found.keys()):
        yield f"{column} {key}", expected.get(key, 0), found.get(key, 0)


def _outcome(rule: Rule, expected: Any, found: Any) -> Outcome:
    if isinstance(expected, str):
        better, changed = found == rule.best, found != expected
    else:
        move = _move(rule, expected, found)
        better, changed = move == rule.may, move != 0
    if not changed:
        return Outcome.PASS
    return Outcome.IMPROVED if better else Outcome.FAIL


def _move(rule: Rule, expected: float, found: float) -> int:
    """The sign of what happened to a number; 0 within the tolerance. NaN, which is not itself, is above all others."""
    if expected != expected or found != found:
        return (found != found) - (expected != expected)
    expected, found = max(expected, rule.floor), max(found, rule.floor)
    return (found > expected * rule.factor) - (expected > found * rule.factor)


def updated(actual: list[Row], expected: list[Row]) -> list[Row]:
    """The rows of the new baseline, sorted by name.

    A row that passes stays as it is expected, so that noise within the tolerances neither shows in a diff nor adds up
    over many updates. Any other is taken whole, as one measurement, but for its seconds.
    """
    held = {verdict.name for verdict in judge(actual, expected) if verdict.outcome is Outcome.PASS}
    kept = [row for row in expected if row.name in held]
    taken = [replace(row, seconds=None) for row in actual if row.name not in held]
    return sorted(kept + taken, key=lambda row: row.name)


def run(actual: Path, expected: Path, *, update: bool = False, match: str = "*", console: Console) -> int:
    """Judges a results file by a baseline, and says what changed.

    An update, which makes a baseline that is not there, writes everything, models that got worse included: that is what
    a reader of the diff decides about.

    Returns:
        The exit status: 0 if every model passed or the baseline was updated, 1 if anything changed.

    Raises:
        ResultsError: A file cannot be used, or there is no model to judge.
    """
    rows = results.read(actual)
    try:
        baseline = results.read(expected)
    except ResultsError as error:
        if not (update and isinstance(error.__cause__, FileNotFoundError)):
            raise
        baseline = []
    chosen = [row for row in rows if matches(row.name, match)]
    concerned = [row for row in baseline if matches(row.name, match)]
    verdicts = judge(chosen, concerned)
    if not verdicts:
        raise ResultsError(f"no model of {actual} or {expected} matches {match!r}: there is nothing to judge")
    changed = [verdict for verdict in verdicts if verdict.outcome is not Outcome.PASS]
    _print(console, *_summary(verdicts, changed))
    if not changed:
        return 0
    if not update:
        chosen_again = [] if match == "*" else ["--match", match]
        command = ["convbn-fx", "gate", str(actual), "--expected", str(expected), "--update", *chosen_again]
        _print(console, "To expect what was found from now on:", f"  {shlex.join(command)}")
        return 1
    others = [row for row in baseline if not matches(row.name, match)]
    try:
        results.write(expected, others + updated(chosen, concerned))
    except OSError as error:
        raise ResultsError(f"{expected}: cannot be written: {error}") from error
    _print(console, *_written(expected, chosen, changed))
    return 0


def _summary(verdicts: list[Verdict], changed: list[Verdict]) -> Iterator[str]:
    """A line for each model that does not pass, and one that counts all of them."""
    width = max((len(_ascii(verdict.name)) for verdict in changed), default=0)
    for verdict in changed:
        name, differences = _ascii(verdict.name), _ascii("; ".join(verdict.differences))
        yield f"{verdict.outcome:8}  {name:{width}}  {differences}"
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    counts = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in Outcome if outcomes[outcome])
    yield f"{_models(len(verdicts))}: {counts}"


def _written(path: Path, rows: list[Row], changed: list[Verdict]) -> Iterator[str]:
    """What an update did, and what it made the gate expect that nobody wants."""
    outcomes = Counter(verdict.outcome for verdict in changed)
    added, removed = outcomes[Outcome.NEW], outcomes[Outcome.MISSING]
    yield f"{path}: {_models(len(changed) - added - removed)} replaced, {added} added, {removed} removed"
    names = {verdict.name for verdict in changed}
    if bad := [row.name for row in rows if row.name in names and row.status is not Status.PASS]:
        yield f"{_models(len(bad))} expected not to pass from now on: {_ascii(' '.join(sorted(bad)))}"


def _models(count: int) -> str:
    return f"{count} model" if count == 1 else f"{count} models"


def _ascii(text: str) -> str:
    """The text in printable ASCII, everything else escaped."""
    return "".join(each if each.isascii() and each.isprintable() else ascii(each)[1:-1] for each in text)


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.out(line, highlight=False)
