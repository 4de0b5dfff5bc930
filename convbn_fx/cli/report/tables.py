"""What a report says, as tables of plain words and numbers: the terminal and the HTML page show the same ones."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from convbn_fx.cli.report.coefficients import LARGEST, SMALLEST_NORMAL, Coefficients
from convbn_fx.cli.report.inspection import Inspection
from convbn_fx.cli.report.pair_bytes import SavedBytes
from convbn_fx.records import Pair, SkipReason

NOTHING: Final = "-"

WARNINGS_TITLE: Final = "At risk in Deploy mode in float16"
WARNINGS_EXPLANATION: Final = (
    f"Float16's largest number is {LARGEST:.0f}; below {SMALLEST_NORMAL:.1e}, its smallest normal number, it loses "
    "digits. Tune mode is not concerned."
)

_UNITS: Final = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


class Column(NamedTuple):
    """A column's title, and whether its cells are numbers."""

    title: str
    is_number: bool = True


class Table(NamedTuple):
    """Cells of text, row by row."""

    columns: list[Column]
    rows: list[list[str]]


@dataclass(frozen=True)
class LeftBatchNorms:
    """The batch norms that were left for one reason.

    Attributes:
        reason: The reason, with its explanation and cure.
        batch_norms: Their names, by what exactly stood in the way; the key is empty where the reason says it all.
    """

    reason: SkipReason
    batch_norms: dict[str, list[str]]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self.batch_norms.values()))

    @property
    def listed(self) -> list[str]:
        """The names, one line for all that have what stood in the way in common."""
        return [
            f"{detail}: {', '.join(names)}" if detail else ", ".join(names)
            for detail, names in self.batch_norms.items()
        ]


def heading(inspection: Inspection) -> str:
    """What was called with what."""
    called = f"{inspection.model}.{inspection.body}" if inspection.body else inspection.model
    return f"{called}({', '.join(inspection.inputs)})"


def uncounted(inspection: Inspection) -> str:
    """Why there are no bytes; empty if there are."""
    return inspection.note and f"Not counted: the call fails on tensors without values ({inspection.note})."


def totals(saved: SavedBytes) -> Table:
    """The bytes of the whole model in each mode."""
    columns = [Column("mode", is_number=False), Column("saved for backward"), Column("of Eval")]
    unit = unit_of([saved.eval])
    rows = [
        [mode, f"{in_unit(count, unit)} {unit}", share(count, saved.eval)]
        for mode, count in (("Eval", saved.eval), ("Tune", saved.tune), ("Deploy", saved.deploy))
    ]
    return Table(columns, rows)


def pairs(inspection: Inspection) -> Table:
    """Each pair with its bytes and coefficients."""
    titles = ("coefficients: smallest", "median", "largest", "negative", "zero")
    return Table(
        [Column("pair", is_number=False), *_byte_columns(inspection), *map(Column, titles)],
        [
            [together(row.pair), *cells, *_magnitudes(row.coefficients), *_counts(row.coefficients)]
            for row, cells in zip(inspection.pairs, _byte_cells(inspection), strict=True)
        ],
    )


def pairs_in_brief(inspection: Inspection) -> Table:
    """The same for a narrow page: of the coefficients only the smallest, median and largest, in one cell."""
    return Table(
        [Column("pair", is_number=False), *_byte_columns(inspection), Column("coefficients")],
        [
            [together(row.pair), *cells, " / ".join(_magnitudes(row.coefficients))]
            for row, cells in zip(inspection.pairs, _byte_cells(inspection), strict=True)
        ],
    )


def together(pair: Pair) -> str:
    """The names of a pair, where they are one another's siblings without saying twice of whom."""
    parent, _, own = pair.batch_norm.rpartition(".")
    siblings = pair.convolution.rpartition(".")[0] == parent
    return f"{pair.convolution} + {own if siblings else pair.batch_norm}"


def _unit(inspection: Inspection) -> str:
    return unit_of(row.saved.eval for row in inspection.pairs if row.saved is not None)


def _run_several_times(inspection: Inspection) -> bool:
    return any(row.calls > 1 for row in inspection.pairs)


def _byte_columns(inspection: Inspection) -> list[Column]:
    unit = _unit(inspection)
    calls = [Column("calls")] if _run_several_times(inspection) else []
    return [*calls, *(Column(f"{mode} {unit}") for mode in ("Eval", "Tune", "Deploy")), Column("of Eval")]


def _byte_cells(inspection: Inspection) -> list[list[str]]:
    unit, with_calls = _unit(inspection), _run_several_times(inspection)
    cells = []
    for row in inspection.pairs:
        calls = [str(row.calls)] if with_calls else []
        if row.saved is None:
            cells.append([*calls, *[NOTHING] * 4])
        else:
            counts = (row.saved.eval, row.saved.tune, row.saved.deploy)
            share_of_tune = share(row.saved.tune, row.saved.eval)
            cells.append([*calls, *(in_unit(count, unit) for count in counts), share_of_tune])
    return cells


def _magnitudes(coefficients: Coefficients | None) -> list[str]:
    if coefficients is None:
        return [NOTHING] * 3
    sizes = (coefficients.smallest, coefficients.median, coefficients.largest)
    return [NOTHING if size is None else f"{size:.2g}" for size in sizes]


def _counts(coefficients: Coefficients | None) -> list[str]:
    return [NOTHING] * 2 if coefficients is None else [str(coefficients.negative), str(coefficients.zero)]


def remarks(inspection: Inspection) -> list[str]:
    """What is to be known to read the table of pairs, and what it comes to in all."""
    found = []
    others = inspection.others
    if others is not None and any(row.saved is not None for row in inspection.pairs):
        unit = unit_of([others.eval])
        found.append(
            "What several pairs keep counts in the first of them. Other layers keep "
            f"{in_unit(others.eval, unit)} {unit} besides, {in_unit(others.tune, unit)} {unit} in Tune mode."
        )
    uncounted = sum(row.saved is None for row in inspection.pairs)
    if uncounted and inspection.saved is not None:
        found.append(f"Without bytes of their own: {uncounted}, functions or not called with these inputs.")
    every = inspection.coefficients
    smallest, median, largest = every.smallest, every.median, every.largest
    if smallest is not None and median is not None and largest is not None:
        found.append(
            f"The {len(every.values)} coefficients gamma / sqrt(var + eps) have magnitudes from {smallest:.2g} to "
            f"{largest:.2g}, median {median:.2g}; {every.negative} are negative, {every.zero} zero."
        )
    return found


def refusals(inspection: Inspection) -> list[LeftBatchNorms]:
    """The batch norms that were left, by reason, the most frequent first."""
    found: dict[SkipReason, LeftBatchNorms] = {}
    for skip in inspection.report.skipped:
        refusal = found.setdefault(skip.reason, LeftBatchNorms(skip.reason, {}))
        detail = re.sub(r"_\d+$", "", skip.detail)  # of a node's name, the number says nothing
        refusal.batch_norms.setdefault(detail, []).append(skip.batch_norm)
    return sorted(found.values(), key=lambda refusal: -refusal.count)


def warnings(inspection: Inspection) -> list[tuple[str, str]]:
    """The pairs that are at risk in float16, and what is."""
    return [(together(pair), warning) for pair, warning in inspection.warnings]


def unit_of(counts: Iterable[int]) -> str:
    """The unit in which the largest of several numbers of bytes is at least 1."""
    largest = max(counts, default=0)
    return next((unit for unit, size in _UNITS.items() if largest >= size), "bytes")


def in_unit(count: int, unit: str) -> str:
    """A number of bytes, without the unit."""
    return f"{count / _UNITS[unit]:.2f}" if unit in _UNITS else str(count)


def share(part: int, whole: int) -> str:
    """A percentage."""
    return f"{part / whole:.1%}" if whole else NOTHING
