"""What all rows say together: how many models, how many pairs, how much memory; and how a terminal shows it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from convbn_fx.cli.zoo.results import ERRORS, Row, Status
from convbn_fx.records import SkipReason

#: Stands for what was not measured.
UNMEASURED = "–"  # noqa: RUF001 - an en dash is meant


@dataclass(frozen=True)
class Worst:
    """The largest value of a column, and the model that it belongs to; not a number is larger than all numbers."""

    value: float
    name: str


@dataclass(frozen=True)
class Spread:
    """How a number is distributed over some models."""

    models: int
    median: float
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class Family:
    """The models that their library keeps in one module.

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


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All rows together.

    Attributes:
        models: Number of rows.
        by_status: Number of models by status, in the order of `Status`; those that no model has are left out.
        with_batch_norms: Models known to have a batch norm.
        without_batch_norms: Models known to have none.
        whole: Models that passed, with batch norms, every one of them fused.
        pairs: Pairs fused.
        refused: Batch norms left, by reason; the most frequent reason first.
        worst: The largest error of each column of `ERRORS` in which one was measured.
        saved: The part of the memory for the backward pass that Tune saves, over all models with pairs.
        tune_by_deploy: Median over the same models of the memory of Tune, divided by Deploy's.
        families: The families, by name.
    """

    models: int
    by_status: Mapping[Status, int]
    with_batch_norms: int
    without_batch_norms: int
    whole: int
    pairs: int
    refused: Mapping[str, int]
    worst: Mapping[str, Worst]
    saved: Spread | None
    tune_by_deploy: float | None
    families: tuple[Family, ...]


def saved(row: Row) -> float | None:
    """The part of the memory for the backward pass that Tune saves: 0.4 if it keeps 60 of Eval's 100 bytes."""
    ratio = _ratio(row.bytes_tune, row.bytes_eval)
    return None if ratio is None else 1 - ratio


def is_whole(row: Row) -> bool:
    """Whether the model passed, has batch norms, and every one of them is fused."""
    measured = row.status is Status.PASS and bool(row.batch_norms) and bool(row.fused)
    return measured and row.refused is not None and not any(row.refused.values())


def explanation(reason: str) -> str:
    """What the name of a `SkipReason` means; nothing if this version has no such reason."""
    return str(SkipReason[reason]) if reason in SkipReason.__members__ else ""


def summarize(rows: Iterable[Row]) -> Summary:
    """Puts rows together.

    Args:
        rows: The rows, in any order; the summary does not depend on it.

    Returns:
        The summary; of no rows, too.
    """
    rows = sorted(rows, key=lambda row: (row.family, row.name))
    statuses = Counter(row.status for row in rows)
    refused = sum((Counter(row.refused) for row in rows if row.refused), Counter[str]())
    whole_saved, whole_ratio = _memory(rows)
    return Summary(
        models=len(rows),
        by_status={status: statuses[status] for status in Status if statuses[status]},
        with_batch_norms=sum(bool(row.batch_norms) for row in rows),
        without_batch_norms=sum(row.batch_norms == 0 for row in rows),
        whole=sum(map(is_whole, rows)),
        pairs=sum(row.fused or 0 for row in rows),
        refused=dict(sorted(refused.items(), key=lambda item: (-item[1], item[0]))),
        worst={column: worst for column in ERRORS if (worst := _worst(rows, column))},
        saved=whole_saved,
        tune_by_deploy=whole_ratio,
        families=tuple(_family(name, list(of)) for name, of in groupby(rows, key=lambda row: row.family)),
    )


def _ratio(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole


def _memory(rows: Sequence[Row]) -> tuple[Spread | None, float | None]:
    """What Tune saves over the rows with pairs, and the median of its memory by Deploy's."""
    with_pairs = [row for row in rows if row.fused]
    parts = [part for row in with_pairs if (part := saved(row)) is not None]
    ratios = [ratio for row in with_pairs if (ratio := _ratio(row.bytes_tune, row.bytes_deploy)) is not None]
    spread = Spread(len(parts), median(parts), min(parts), max(parts)) if parts else None
    return spread, median(ratios) if ratios else None


def _worst(rows: Iterable[Row], column: str) -> Worst | None:
    named = ((getattr(row, column), row.name) for row in rows)
    found = [Worst(value, name) for value, name in named if value is not None]
    return min(found, key=lambda worst: (not math.isnan(worst.value), -worst.value, worst.name), default=None)


def _family(name: str, rows: Sequence[Row]) -> Family:
    spread, ratio = _memory(rows)
    pairs = sum(row.fused or 0 for row in rows)
    return Family(name=name, models=len(rows), pairs=pairs, saved=spread, tune_by_deploy=ratio)


def percent(part: float) -> str:
    """0.3645 as `36.5 %`."""
    return f"{100 * part:.1f} %"


def render(summary: Summary) -> RenderableType:
    """The summary for a terminal.

    Args:
        summary: What to show.

    Returns:
        Tables, without those that would be empty.
    """
    tables = [_totals(summary)]
    if summary.refused:
        tables.append(_refusals(summary))
    if summary.worst:
        tables.append(_errors(summary))
    if any(family.saved for family in summary.families):
        tables.append(_families(summary))
    return Group(*tables)


def _table(title: str, *columns: str, numbers: Iterable[int] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    return table


def _add(table: Table, *cells: object) -> None:
    """Adds a row of plain text: a name with brackets in it is no markup."""
    table.add_row(*(Text(UNMEASURED if cell is None else str(cell)) for cell in cells))


def _totals(summary: Summary) -> Table:
    table = _table("Models", "", "", numbers=[1])
    _add(table, "models", summary.models)
    for status, count in summary.by_status.items():
        _add(table, f"  {status}", count)
    _add(table, "without batch norms", summary.without_batch_norms)
    _add(table, "with batch norms", summary.with_batch_norms)
    _add(table, "  pass, every one fused", summary.whole)
    _add(table, "pairs fused", summary.pairs)
    _add(table, "batch norms left", sum(summary.refused.values()))
    _add(table, "memory saved, median", summary.saved and percent(summary.saved.median))
    return table


def _refusals(summary: Summary) -> Table:
    table = _table("Batch norms left, by reason", "reason", "batch norms", "explanation", numbers=[1])
    for reason, count in summary.refused.items():
        _add(table, reason, count, explanation(reason))
    return table


def _errors(summary: Summary) -> Table:
    table = _table("Worst relative errors", "of", "error", "model", numbers=[1])
    for column, worst in summary.worst.items():
        _add(table, ERRORS[column], f"{worst.value:.1e}", worst.name)
    return table


def _families(summary: Summary) -> Table:
    table = _table(
        "Memory saved for the backward pass, by family",
        *("family", "models", "pairs", "median", "least", "most", "Tune / Deploy"),
        numbers=range(1, 7),
    )
    for family in summary.families:
        if (part := family.saved) is None:
            continue
        ratio = None if family.tune_by_deploy is None else f"{family.tune_by_deploy:.2f}"
        shares = map(percent, (part.median, part.least, part.most))
        _add(table, family.name or UNMEASURED, family.models, family.pairs, *shares, ratio)
    return table
