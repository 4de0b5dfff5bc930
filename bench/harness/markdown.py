"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from bench.harness.timing import Ratio

#: Stands for what was not measured.
NOTHING = "–"  # noqa: RUF001 - an en dash is meant


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first column is text, the others are numbers.

    Args:
        columns: The heads.
        rows: The cells; None where nothing was measured.

    Returns:
        Its lines, with a newline after each.
    """
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[NOTHING if cell is None else str(cell) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def megabytes(count: float | None) -> str | None:
    """Bytes as MB, to three digits."""
    return None if count is None else f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def spread(ratio: Ratio | None) -> str | None:
    """The median, and the quartiles behind it: `0.82 (0.80-0.84)`."""
    return None if ratio is None else f"{ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})"


def error(value: float | None) -> str | None:
    """A relative error, such as `3.1e-15`; 0 for none."""
    return None if value is None else "0" if value == 0 else f"{value:.1e}"
