"""The picture in a report: the memory of each pair before and after, and the coefficients' histogram."""

import math
from io import StringIO
from pathlib import Path
from typing import Any, Final

from convbn_fx.cli.report.inspection import Inspection
from convbn_fx.cli.report.tables import heading, in_unit, share, uncounted, unit_of

PICTURE_FORMATS: Final = (".png", ".svg", ".pdf")

# Of Okabe and Ito's palette: apart for every kind of colour vision, on white and on black, and in grey too.
_EVAL, _TUNE, _NEGATIVE = "#E69F00", "#0072B2", "#CC79A7"

#: More names than this cannot be read side by side.
_NAMES: Final = 60

_BINS: Final = 60

#: A name longer than this is cut off at its front.
_LETTERS: Final = 32


def plot(inspection: Inspection, path: Path) -> None:
    """Draws the memory of each pair in the order of the network, and the histogram of all coefficients.

    Args:
        inspection: What `inspect_model` returned.
        path: Where to; the suffix is one of `PICTURE_FORMATS`.
    """
    import matplotlib.style as mpl

    with mpl.context(_STYLE, after_reset=True):  # whatever the user's own is
        metadata = _NO_METADATA if path.suffix.lower() == ".svg" else None
        _figure(inspection, with_heading=True).savefig(path, dpi=150, metadata=metadata)


def inline_svg(inspection: Inspection) -> str:
    """The same picture as an `<svg>` element, its text escaped: on a page's background, in the colour of its text."""
    file = StringIO()
    import matplotlib.style as mpl

    with mpl.context(_STYLE | _ON_A_PAGE, after_reset=True):
        _figure(inspection, with_heading=False).savefig(file, format="svg", metadata=_NO_METADATA)
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT_COLOR, "currentColor")


_TEXT_COLOR: Final = "#0a0b0c"  # any colour that is nowhere else
_ON_A_PAGE: Final = {
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), _TEXT_COLOR),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), _TEXT_COLOR),
    "savefig.transparent": True,
}
_NO_METADATA: Final = dict.fromkeys(("Creator", "Date", "Format", "Type"))


_STYLE: Final = {
    "svg.hashsalt": "convbn_fx",  # the same names inside of it at every run
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid.axis": "y",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def _figure(inspection: Inspection, with_heading: bool) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    if with_heading:
        figure.suptitle(_heading(inspection), fontsize=11, x=0.01, ha="left", parse_math=False)
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_memory(upper, inspection)
    _draw_coefficients(lower, inspection)
    return figure


def _draw_memory(axes: Any, inspection: Inspection) -> None:
    """One bar per pair: what Eval mode keeps, and in front of it what Tune mode keeps."""
    rows = [(row.pair.convolution, row.saved) for row in inspection.pairs if row.saved is not None]
    axes.set_title("Saved for the backward pass by each pair")
    if not rows:
        _say(axes, uncounted(inspection) or "no pair was counted")
        return
    unit = unit_of(saved.eval for _, saved in rows)
    width = 0.8 if len(rows) <= _NAMES else 1.0
    for label, color, counts in (
        ("Eval mode (the whole bar)", _EVAL, [saved.eval for _, saved in rows]),
        ("Tune mode", _TUNE, [saved.tune for _, saved in rows]),
    ):
        heights = [float(in_unit(count, unit)) for count in counts]
        axes.bar(range(len(rows)), heights, width, color=color, label=label)
    axes.set(xlim=(-0.7, len(rows) - 0.3), ylabel=unit)
    named = range(0, len(rows), math.ceil(len(rows) / _NAMES))
    names = [_shortened(rows[place][0]) for place in named]
    axes.set_xticks(named, names, rotation=90, fontsize=7, parse_math=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, ncols=2)  # beside the title


def _heading(inspection: Inspection) -> str:
    saved = inspection.saved
    if saved is None:
        return heading(inspection)
    unit = unit_of([saved.eval])
    before, after = (f"{in_unit(count, unit)} {unit}" for count in (saved.eval, saved.tune))
    return f"{heading(inspection)}: {before} in Eval mode, {after} in Tune mode ({share(saved.tune, saved.eval)})"


def _draw_coefficients(axes: Any, inspection: Inspection) -> None:
    """The magnitudes on a logarithmic axis, negative ones on top of positive ones."""
    import numpy as np

    values = [value for value in inspection.coefficients.values if math.isfinite(value) and value != 0]
    axes.set_title("Coefficients gamma / sqrt(var + eps): magnitudes")
    if not values:
        _say(axes, "no coefficient is known")
        return
    magnitudes = [abs(value) for value in values]
    edges = np.geomspace(min(magnitudes) / 3.2, max(magnitudes) * 3.2, _BINS + 1)  # over a decade at least
    positive, negative = [v for v in values if v > 0], [-v for v in values if v < 0]
    axes.hist(
        [positive, negative],
        edges,
        stacked=True,
        color=[_TUNE, _NEGATIVE],
        label=[f"{len(positive)} positive", f"{len(negative)} negative"],
    )
    axes.set(xscale="log", ylabel="channels")
    zero = inspection.coefficients.to_json()["zero"]
    axes.legend(loc="upper left", title=f"{zero} zero (not shown)" if zero else None)


def _say(axes: Any, words: str) -> None:
    centred = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, words, wrap=True, parse_math=False, **centred)
    axes.set_axis_off()


def _shortened(name: str) -> str:
    """The name, or as much of its end as there is room for, from a dot on."""
    if len(name) <= _LETTERS:
        return name
    end = name[-_LETTERS:]
    return f"\N{HORIZONTAL ELLIPSIS}{end[max(end.find('.'), 0) :]}"
