"""A report for people: in the terminal, and as a page of HTML.

Needs rich; the page needs matplotlib and jinja2, too, which are imported when it is written.
"""

from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from convbn_fx.cli import html_page
from convbn_fx.cli.report import tables
from convbn_fx.cli.report.coefficients import FLOAT16_CURE
from convbn_fx.cli.report.inspection import Inspection
from convbn_fx.cli.report.plotting import inline_svg


def render(inspection: Inspection) -> RenderableType:
    """What the terminal shows, for `rich.print` or a `rich.console.Console`."""
    parts: list[RenderableType] = [
        Text(tables.heading(inspection), style="bold"),
        Text(inspection.report.summary),
    ]
    if inspection.saved is None:
        parts.append(Text(tables.uncounted(inspection), style="yellow"))
    else:
        parts += [Text(), _table(tables.totals(inspection.saved))]
    if inspection.pairs:
        parts += [Text(), _table(tables.pairs(inspection, brief=True))]
        parts += [Text(remark, style="dim") for remark in tables.remarks(inspection)]
    for refusal in tables.refusals(inspection):
        parts += [Text(), *_refusal(refusal)]
    warnings = tables.warnings(inspection)
    if warnings:
        parts += [Text(), Text(tables.WARNINGS_TITLE, style="bold yellow")]
        parts.append(_indented(tables.WARNINGS_EXPLANATION, style="dim"))
        parts += [_indented(f"{names}: {warning}") for names, warning in warnings]
        parts.append(_indented(f"cure: {FLOAT16_CURE}", style="green"))
    return Group(*parts)


def _refusal(refusal: tables.LeftBatchNorms) -> list[RenderableType]:
    return [
        Text(f"{refusal.count} left: {refusal.reason.name}", style="bold"),
        _indented(refusal.reason.value),
        _indented(f"cure: {refusal.reason.cure}", style="green"),
        *(_indented(line, style="dim") for line in refusal.listed),
    ]


def _indented(words: str, style: str = "") -> Padding:
    return Padding(Text(words, style=style), (0, 0, 0, 2))


def _table(content: tables.Table) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    words, *numbers = content.columns
    table.add_column(Text(words), overflow="fold")
    for column in numbers:
        title = "\n".join(column.rsplit(" ", 1))  # the numbers are narrow
        table.add_column(Text(title), justify="right", no_wrap=True)
    for row in content.rows:
        table.add_row(*map(Text, row))
    return table


def write_html(inspection: Inspection, path: Path) -> None:
    """Writes a page that needs nothing but itself: the tables, and the picture inside of it."""
    from markupsafe import Markup

    picture = Markup(inline_svg(inspection))  # noqa: S704 - matplotlib escapes the text in it
    written = html_page(
        "report/report.html", inspection=inspection, tables=tables, picture=picture, cure=FLOAT16_CURE
    )
    path.write_text(written, encoding="utf-8")
