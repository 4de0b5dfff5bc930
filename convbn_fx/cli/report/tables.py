"""What a report says, as tables of plain words and numbers: the terminal and the HTML page show the same ones."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from convbn_fx.cli.report.coefficients import LARGEST, SMALLEST_NORMAL
from convbn_fx.cli.report.inspection import Inspection
from convbn_fx.cli.report.pair_bytes import SavedBytes
from convbn_fx.records import Pair, SkipReason

NOTHING: Final = "-"

WARNINGS_TITLE: Final = "At risk in Deploy mode in float16"
WARNINGS_EXPLANATION: Final = (
    f"Float16's largest number is {LARGEST:.0f}; below {SMALLEST_NORMAL:.1e}, its smallest normal number, it loses "
    "digits. Tune mode is not concerned."
)

_MODES: Final = ("Eval", "Tune", "Deploy")
_UNITS: Final = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


class Table(NamedTuple):
    """Cells of text, row by row: words in the first column, numbers in all others."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class LeftBatchNorms:
    """The batch norms that were left for one reason.

    Attributes:
        reason: The reason, with its explanation and cure.
        count: How many there are.
        listed: Their names, one line for all that have what stood in the way in common.
    """

    reason: SkipReason
    count: int
    listed: list[str]


def heading(inspection: Inspection) -> str:
    """What was called with what."""
    called = f"{inspection.model}.{inspection.body}" if inspection.body else inspection.model
    return f"{called}({', '.join(inspection.inputs)})"


def uncounted(inspection: Inspection) -> str:
    """Why there are no bytes; empty if there are."""
    return inspection.note and f"Not counted: the call fails on tensors without values ({inspection.note})."


def totals(saved: SavedBytes) -> Table:
    """The bytes of the whole model in each mode."""
    unit = unit_of([saved.eval])
    rows = [
        [mode, f"{in_unit(count, unit)} {unit}", share(count, saved.eval)]
        for mode, count in zip(_MODES, saved, strict=True)
    ]
    return Table(["mode", "saved for backward", "of Eval"], rows)


def pairs(inspection: Inspection, *, brief: bool = False) -> Table:
    """Each pair with its bytes and coefficients; in brief, these are the smallest, median and largest in one cell."""
    unit = unit_of(row.saved.eval for row in inspection.pairs if row.saved is not None)
    with_calls = any(row.calls > 1 for row in inspection.pairs)
    columns = ["pair", *["calls"] * with_calls, *(f"{mode} {unit}" for mode in _MODES), "of Eval"]
    full = ["coefficients: smallest", "median", "largest", "negative", "zero"]
    table = Table([*columns, *(["coefficients"] if brief else full)], [])
    for row in inspection.pairs:
        cells = [together(row.pair), *[str(row.calls)] * with_calls]
        if row.saved is None:
            cells += [NOTHING] * 4
        else:
            cells += [*(in_unit(count, unit) for count in row.saved), share(row.saved.tune, row.saved.eval)]
        summary = row.coefficients.to_json() if row.coefficients is not None else {}
        sizes = [summary.get(key) for key in ("smallest", "median", "largest")]
        magnitudes = [NOTHING if size is None else f"{size:.2g}" for size in sizes]
        counts = [str(summary.get(key, NOTHING)) for key in ("negative", "zero")]
        table.rows.append([*cells, *([" / ".join(magnitudes)] if brief else magnitudes + counts)])
    return table


def together(pair: Pair) -> str:
    """The names of a pair, where they are one another's siblings without saying twice of whom."""
    parent, _, own = pair.batch_norm.rpartition(".")
    siblings = pair.convolution.rpartition(".")[0] == parent
    return f"{pair.convolution} + {own if siblings else pair.batch_norm}"


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
    every = inspection.coefficients.to_json()
    if every["median"] is not None:
        found.append(
            f"The {every['channels']} coefficients gamma / sqrt(var + eps) have magnitudes from "
            f"{every['smallest']:.2g} to {every['largest']:.2g}, median {every['median']:.2g}; "
            f"{every['negative']} are negative, {every['zero']} zero."
        )
    return found


def refusals(inspection: Inspection) -> list[LeftBatchNorms]:
    """The batch norms that were left, by reason, the most frequent first."""
    found: dict[SkipReason, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for skip in inspection.report.skipped:
        detail = re.sub(r"_\d+$", "", skip.detail)  # of a node's name, the number says nothing
        found[skip.reason][detail and f"{detail}: "].append(skip.batch_norm)
    left = [
        LeftBatchNorms(
            reason,
            sum(map(len, parts.values())),
            [f"{why}{', '.join(names)}" for why, names in parts.items()],
        )
        for reason, parts in found.items()
    ]
    return sorted(left, key=lambda refusal: -refusal.count)


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
