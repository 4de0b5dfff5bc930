"""The results as one HTML file: the totals, a chart, and a table of all models to sort and filter.

The file loads nothing, so that it works from a disk, and in ten years. The template, `page.html`, says where everything
stands, and its script shows, hides and moves the rows of a table that is complete.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from convbn_fx.cli import html_page
from convbn_fx.cli.zoo.results import ERRORS, Row
from convbn_fx.cli.zoo.summary import UNMEASURED, explanation, percent, saved, summarize


class _Column(NamedTuple):
    """A column of the table of models.

    Attributes:
        key: Its name in links to a view.
        label: Its heading.
        width: In rem.
        form: How its numbers are written; None if it holds words, which the filter looks at.
        group: The heading over it and its neighbours of the same group.
        title: What it is, at length.
        scale: What its numbers are shown in.
        of: Its value of a row; the row's own of that name unless told.
    """

    key: str
    label: str
    width: float
    form: str | None = None
    group: str = ""
    title: str = ""
    scale: float = 1
    of: Callable[[Row], Any] | None = None

    def cell(self, row: Row) -> tuple[str, str]:
        """What is read, and the number to sort by if it is another; what is not a number is beyond all numbers."""
        value = self.of(row) if self.of else getattr(row, self.key)
        if value is None or (value == "" and not self.of):
            return UNMEASURED, ""
        if self.form is None:
            return str(value), ""
        shown = f"{value / self.scale:{self.form}}" if value else "0"
        exact = f"{value:.15g}" if math.isfinite(value) else "Infinity"
        return shown, "" if shown == exact else exact


def _reason(name: str) -> str:
    return name.lower().replace("_", " ")


def _refused(row: Row) -> int | None:
    return None if row.refused is None else sum(row.refused.values())


def _saved(row: Row) -> float | None:
    return None if (part := saved(row)) is None else round(100 * part, 4)


def _notes(row: Row) -> str:
    reasons = [f"{count} {_reason(name)}" for name, count in sorted((row.refused or {}).items())]
    return "; ".join([*reasons, row.detail] if row.detail else reasons)


_NORMS, _BYTES = "Batch norms", "Kept for backward, MB"
_FLOAT64, _FLOAT32 = "Error, float64", "Error, float32"
_GRADIENTS = "Worst relative error of a gradient of Tune, by the input and every parameter"
_COLUMNS = (
    _Column("name", "Model", 17),
    _Column("family", "Family", 11),
    _Column("status", "Status", 6),
    _Column("level", "Level", 5.5),
    _Column("parameters", "Params, M", 6, ".1f", "", "Millions of elements of its parameters", 1e6),
    _Column("batch_norms", "All", 3.5, ".0f", _NORMS),
    _Column("fused", "Fused", 4.5, ".0f", _NORMS, "Pairs fused"),
    _Column("refused", "Left", 4, ".0f", _NORMS, "Left as they were; the last column says why", of=_refused),
    _Column("bytes_eval", "Eval", 5, ".1f", _BYTES, scale=1e6),
    _Column("bytes_tune", "Tune", 5, ".1f", _BYTES, scale=1e6),
    _Column("bytes_deploy", "Deploy", 5, ".1f", _BYTES, scale=1e6),
    _Column("saved", "Saved, %", 5.5, ".1f", _BYTES, "What Tune saves of Eval's memory", of=_saved),
    _Column("output_error", "Outputs", 5.5, ".1e", _FLOAT64, "Worst relative error of an output of Tune"),
    _Column("gradient_error", "Gradients", 5.5, ".1e", _FLOAT64, _GRADIENTS),
    _Column("float32_error_tune", "Tune", 5, ".1e", _FLOAT32, "Worst relative error of an output of Tune"),
    _Column("float32_error_eval", "Eval", 5, ".1e", _FLOAT32, "The same of the model as it is"),
    _Column("seconds", "Seconds", 5, ".1f"),
    _Column("input", "Input", 9),
    _Column("notes", "Left because, and detail", 30, of=_notes),
)
#: The headings over the columns: each with the number of columns that it is over.
_GROUPS = Counter((column.group, column.group or column.key) for column in _COLUMNS)


def write_page(path: Path, rows: list[Row], *, title: str, source: str) -> None:
    """Writes the page into a file, whose folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(rows, title=title, source=source), encoding="utf-8", newline="\n")


def render_page(rows: list[Row], *, title: str, source: str) -> str:
    """The HTML of the page. The same rows give the same bytes, in whatever order they come.

    Args:
        rows: The rows.
        title: What the page is called.
        source: Where the rows come from, for the footer: the results file's name, the versions that were measured.

    Returns:
        HTML.
    """
    return html_page(
        "zoo/page.html",
        title=title,
        source=source,
        summary=summarize(rows),
        errors=ERRORS,
        unmeasured=UNMEASURED,
        percent=percent,
        explanation=explanation,
        reason=_reason,
        columns=_COLUMNS,
        groups=[(name, width) for (name, _), width in _GROUPS.items()],
        models=[[column.cell(row) for column in _COLUMNS] for row in sorted(rows, key=lambda row: row.name)],
    )
