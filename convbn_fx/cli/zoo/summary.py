"""What all rows say together: how many models, how many pairs, how much memory; and how a terminal shows it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from convbn_fx.cli.zoo.results import ERRORS, Row, Status
from convbn_fx.records import SkipReason

#: Stands for what was not measured.
UNMEASURED = "–"  # noqa: RUF001 - an en dash is meant


class Worst(NamedTuple):
    """The largest value of a column, and the model that it belongs to; not a number is larger than all numbers."""

    value: float
    name: str


class Spread(NamedTuple):
    """How a number is distributed over some models."""

    models: int
    median: float
    least: float
    most: float


class Family(NamedTuple):
    """Models together: those that their library keeps in one module, or all of them.

    Attributes:
        name: The module, such as `timm.resnet`.
        models: Number of its models.
        pairs: Number of pairs fused in all of them.
        saved: The part of the memory for the backward pass that Tune saves, over its models with pairs; None if no
            memory was measured.
        tune_by_deploy: Median over the same models of the memory of Tune, divided by Deploy's, the lower limit.
    """

    name: str
    models: int
    pairs: int
    saved: Spread | None
    tune_by_deploy: float | None

    @property
    def cells(self) -> list[str]:
        """What a table says of it."""
        shares = [UNMEASURED] * 3 if self.saved is None else map(percent, self.saved[1:])
        ratio = UNMEASURED if self.tune_by_deploy is None else f"{self.tune_by_deploy:.2f}"
        return [self.name or UNMEASURED, str(self.models), str(self.pairs), *shares, ratio]


class Summary(NamedTuple):
    """All rows together.

    Attributes:
        total: All of them as one family.
        by_status: Number of models by status, in the order of `Status`; those that no model has are left out.
        with_batch_norms: Models known to have a batch norm.
        without_batch_norms: Models known to have none.
        whole: Models that passed, with batch norms, every one of them fused.
        refused: Batch norms left, by reason; the most frequent reason first.
        worst: The largest error of each column of `ERRORS` in which one was measured.
        families: The families, by name.
    """

    total: Family
    by_status: Mapping[Status, int]
    with_batch_norms: int
    without_batch_norms: int
    whole: int
    refused: Mapping[str, int]
    worst: Mapping[str, Worst]
    families: tuple[Family, ...]


def saved(row: Row) -> float | None:
    """The part of the memory for the backward pass that Tune saves: 0.4 if it keeps 60 of Eval's 100 bytes."""
    ratio = _ratio(row.bytes_tune, row.bytes_eval)
    return None if ratio is None else 1 - ratio


def _ratio(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole


def is_whole(row: Row) -> bool:
    """Whether the model passed, has batch norms, and every one of them is fused."""
    measured = row.status is Status.PASS and bool(row.batch_norms) and bool(row.fused)
    return measured and row.refused is not None and not any(row.refused.values())


def explanation(reason: str) -> str:
    """What the name of a `SkipReason` means; nothing if this version has no such reason."""
    return str(SkipReason[reason]) if reason in SkipReason.__members__ else ""


def percent(part: float) -> str:
    """0.3645 as `36.5 %`."""
    return f"{100 * part:.1f} %"


def summarize(rows: Iterable[Row]) -> Summary:
    """Puts rows together, whatever order they come in."""
    rows = sorted(rows, key=lambda row: (row.family, row.name))
    statuses = Counter(row.status for row in rows)
    refused = sum((Counter(row.refused) for row in rows if row.refused), Counter[str]())
    return Summary(
        total=_family("", rows),
        by_status={status: statuses[status] for status in Status if statuses[status]},
        with_batch_norms=sum(bool(row.batch_norms) for row in rows),
        without_batch_norms=sum(row.batch_norms == 0 for row in rows),
        whole=sum(map(is_whole, rows)),
        refused=dict(sorted(refused.items(), key=lambda item: (-item[1], item[0]))),
        worst={column: worst for column in ERRORS if (worst := _worst(rows, column))},
        families=tuple(_family(name, list(of)) for name, of in groupby(rows, key=lambda row: row.family)),
    )


def _family(name: str, rows: Sequence[Row]) -> Family:
    with_pairs = [row for row in rows if row.fused]
    parts = [part for row in with_pairs if (part := saved(row)) is not None]
    ratios = [ratio for row in with_pairs if (ratio := _ratio(row.bytes_tune, row.bytes_deploy)) is not None]
    return Family(
        name,
        models=len(rows),
        pairs=sum(row.fused or 0 for row in rows),
        saved=Spread(len(parts), median(parts), min(parts), max(parts)) if parts else None,
        tune_by_deploy=median(ratios) if ratios else None,
    )


def _worst(rows: Iterable[Row], column: str) -> Worst | None:
    named = ((getattr(row, column), row.name) for row in rows)
    found = [Worst(value, name) for value, name in named if value is not None]
    return min(found, key=lambda worst: (not math.isnan(worst.value), -worst.value, worst.name), default=None)


def render(summary: Summary) -> RenderableType:
    """The summary as tables for a terminal, without those that would be empty."""
    total = summary.total
    totals = [
        ("models", total.models),
        *((f"  {status}", count) for status, count in summary.by_status.items()),
        ("without batch norms", summary.without_batch_norms),
        ("with batch norms", summary.with_batch_norms),
        ("  pass, every one fused", summary.whole),
        ("pairs fused", total.pairs),
        ("batch norms left", sum(summary.refused.values())),
        ("memory saved, median", percent(total.saved.median) if total.saved else UNMEASURED),
    ]
    refused = [(reason, count, explanation(reason)) for reason, count in summary.refused.items()]
    errors = [(ERRORS[column], f"{value:.1e}", name) for column, (value, name) in summary.worst.items()]
    families = [family.cells for family in summary.families if family.saved]
    tables = (
        _table("Models", ["", ""], totals, numbers=[1]),
        _table("Batch norms left, by reason", ["reason", "batch norms", "explanation"], refused, numbers=[1]),
        _table("Worst relative errors", ["of", "error", "model"], errors, numbers=[1]),
        _table(
            "Memory saved for the backward pass, by family",
            ["family", "models", "pairs", "median", "least", "most", "Tune / Deploy"],
            families,
            numbers=range(1, 7),
        ),
    )
    return Group(*(table for table in tables if table.rows))


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int]
) -> Table:
    """A table of plain text: a name with brackets in it is no markup."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table
