"""The results as one HTML file: the totals, a chart, and a table of all models to sort and filter.

The file loads nothing, so that it works from a disk, and in ten years. Everything is computed here; the template,
`page.html`, says where it stands, and its script shows, hides and moves the rows of a table that is complete.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from convbn_fx.cli.zoo.chart import chart, label, sentence
from convbn_fx.cli.zoo.results import ERRORS, Row
from convbn_fx.cli.zoo.summary import UNMEASURED, explanation, percent, saved, summarize


@dataclass(frozen=True)
class _Cell:
    """A cell of the table of models.

    Attributes:
        text: What is read.
        value: The number to sort by, if it is not the text.
    """

    text: str
    value: str = ""


@dataclass(frozen=True)
class _Column:
    """A column of the table of models.

    Attributes:
        key: Its name in links to a view.
        label: Its heading.
        cell: What it shows of a row.
        width: In rem.
        group: The heading over it and its neighbours of the same group.
        title: What it is, at length.
        text: Whether it holds words, not numbers. The filter looks at words.
    """

    key: str
    label: str
    cell: Callable[[Row], _Cell]
    width: float
    group: str = ""
    title: str = ""
    text: bool = False


def _words(column: str) -> Callable[[Row], _Cell]:
    return lambda row: _Cell(str(getattr(row, column)) or UNMEASURED)


def _number(value: float | None, text: str, scale: float = 1) -> _Cell:
    """A number, shown as `text` says and sorted by its own value; what is not a number is beyond all numbers."""
    if value is None:
        return _Cell(UNMEASURED)
    shown = text.format(value / scale)
    exact = f"{value:.15g}" if math.isfinite(value) else "Infinity"
    return _Cell(shown, "" if shown == exact else exact)


def _numbers(column: str, text: str, scale: float = 1) -> Callable[[Row], _Cell]:
    return lambda row: _number(getattr(row, column), text, scale)


def _error(column: str) -> Callable[[Row], _Cell]:
    return lambda row: _number(value := getattr(row, column), "{:.1e}" if value else "{:.0f}")


def _reason(name: str) -> str:
    return name.lower().replace("_", " ")


def _refused(row: Row) -> _Cell:
    return _number(None if row.refused is None else sum(row.refused.values()), "{:.0f}")


def _saved(row: Row) -> _Cell:
    return _number(None if (part := saved(row)) is None else round(100 * part, 4), "{:.1f}")


def _notes(row: Row) -> _Cell:
    reasons = [f"{row.refused[name]} {_reason(name)}" for name in sorted(row.refused)] if row.refused else []
    return _Cell("; ".join([*reasons, row.detail] if row.detail else reasons))


_COUNT = partial(_numbers, text="{:.0f}")
_MILLIONS = partial(_numbers, text="{:.1f}", scale=1e6)
_NORMS, _BYTES = "Batch norms", "Kept for backward, MB"
_FLOAT64, _FLOAT32 = "Error, float64", "Error, float32"

_COLUMNS = (
    _Column("name", "Model", _words("name"), 17, text=True),
    _Column("family", "Family", _words("family"), 11, text=True),
    _Column("status", "Status", _words("status"), 6, text=True),
    _Column("level", "Level", _words("level"), 5.5, text=True),
    _Column(
        "parameters", "Params, M", _MILLIONS("parameters"), 6, "", "Millions of elements of its parameters"
    ),
    _Column("batch_norms", "All", _COUNT("batch_norms"), 3.5, _NORMS),
    _Column("fused", "Fused", _COUNT("fused"), 4.5, _NORMS, "Pairs fused"),
    _Column(
        "refused", "Left", _refused, 4, _NORMS, "Batch norms left as they were; the last column says why"
    ),
    _Column("bytes_eval", "Eval", _MILLIONS("bytes_eval"), 5, _BYTES),
    _Column("bytes_tune", "Tune", _MILLIONS("bytes_tune"), 5, _BYTES),
    _Column("bytes_deploy", "Deploy", _MILLIONS("bytes_deploy"), 5, _BYTES),
    _Column("saved", "Saved, %", _saved, 5.5, _BYTES, "What Tune saves of Eval's memory"),
    _Column(
        "output_error",
        "Outputs",
        _error("output_error"),
        5.5,
        _FLOAT64,
        "Worst relative error of an output of Tune",
    ),
    _Column(
        "gradient_error",
        "Gradients",
        _error("gradient_error"),
        5.5,
        _FLOAT64,
        "Worst relative error of a gradient of Tune, by the input and every parameter",
    ),
    _Column(
        "float32_error_tune",
        "Tune",
        _error("float32_error_tune"),
        5,
        _FLOAT32,
        "Worst relative error of an output of Tune in float32",
    ),
    _Column(
        "float32_error_eval",
        "Eval",
        _error("float32_error_eval"),
        5,
        _FLOAT32,
        "The same of the model as it is",
    ),
    _Column("seconds", "Seconds", _numbers("seconds", "{:.1f}"), 5),
    _Column("input", "Input", _words("input"), 9, text=True),
    _Column("notes", "Left because, and detail", _notes, 30, text=True),
)


def _groups() -> Iterator[tuple[str, int]]:
    """The headings over the columns: each with the number of columns that it is over."""
    widths = Counter(column.group or column.key for column in _COLUMNS)
    for name, width in widths.items():
        yield (name if name in {column.group for column in _COLUMNS} else ""), width


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("convbn_fx.cli.zoo", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        percent=percent, explanation=explanation, reason=_reason, label=label, sentence=sentence
    )
    return environment


def write_page(path: Path, rows: list[Row], *, title: str, source: str) -> None:
    """Writes the page. The same rows give the same bytes, in whatever order they come.

    Args:
        path: The file; its folder is made if need be.
        rows: The rows.
        title: What the page is called.
        source: Where the rows come from, for the footer: the results file's name, the versions that were measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(rows, title=title, source=source), encoding="utf-8", newline="\n")


def render_page(rows: list[Row], *, title: str, source: str) -> str:
    """The text of the page.

    Args:
        rows: The rows, in any order.
        title: What the page is called.
        source: Where the rows come from, for the footer.

    Returns:
        HTML.
    """
    rows = sorted(rows, key=lambda row: row.name)
    summary = summarize(rows)
    context: dict[str, Any] = {
        "title": title,
        "source": source,
        "summary": summary,
        "errors": ERRORS,
        "unmeasured": UNMEASURED,
        "chart": chart(summary.families),
        "columns": _COLUMNS,
        "groups": list(_groups()),
        "models": [[column.cell(row) for column in _COLUMNS] for row in rows],
    }
    return _environment().get_template("page.html").render(context)
