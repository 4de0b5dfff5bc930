"""Where the bars of the page's chart stand: memory saved by family. The template draws them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from convbn_fx.cli.zoo.summary import UNMEASURED, Family, Spread, percent

_BAR_HEIGHT = 20
_TOP = 22
_PLOT_WIDTH = 190
_NUMBERS_WIDTH = 54
_CHARACTER_WIDTH = 6.4
_LONGEST_LABEL = 32
_BARS_OF_A_PANEL = 26


@dataclass(frozen=True)
class Bar:
    """A family's bar, in the drawing's units: the median, and a line from the least to the most.

    Attributes:
        label: The family, shortened if it is long.
        family: The family.
        number: The median.
        title: All numbers, as a sentence.
        y: Its upper edge.
        left: Its left edge: zero, unless the median is less.
        width: Its width.
        least: Where the line begins.
        most: Where it ends.
    """

    label: str
    family: str
    number: str
    title: str
    y: int
    left: float
    width: float
    least: float
    most: float


@dataclass(frozen=True)
class Panel:
    """A drawing with some of the bars; all panels have the same scale.

    Attributes:
        width: Of the drawing.
        height: Of the drawing.
        top: Where the bars begin.
        label_end: Where the labels end.
        zero: Where nothing is saved.
        ticks: Further places on the scale, and what they are called; zero is one of them.
        bars: The bars, from above.
    """

    width: float
    height: int
    top: int
    label_end: float
    zero: float
    ticks: tuple[tuple[float, str], ...]
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class _Scale:
    """From the part that is saved to a place in the drawing. Its ends are tenths."""

    left: float
    lowest: int
    highest: int

    def at(self, part: float) -> float:
        """The place of a part, rounded, so that the file is short and the same everywhere."""
        return round(self.left + _PLOT_WIDTH * (10 * part - self.lowest) / (self.highest - self.lowest), 1)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Round numbers at most five steps apart, with their places."""
        step = math.ceil((self.highest - self.lowest) / 5)
        tenths = range(-(-self.lowest // step) * step, self.highest + 1, step)
        return tuple((self.at(tenth / 10), f"{10 * tenth} %") for tenth in tenths)


def panels(families: Iterable[Family]) -> list[Panel]:
    """Lays out the families whose memory was measured, the one that saves most first.

    Args:
        families: All families.

    Returns:
        The drawings, side by side; none if nothing was measured.
    """
    parts = [(family, part) for family in families if (part := family.saved)]
    if not parts:
        return []
    parts.sort(key=lambda item: (-item[1].median, item[0].name))
    labels = [_shortened(family.name or UNMEASURED) for family, _ in parts]
    scale = _Scale(
        left=round(max(map(len, labels)) * _CHARACTER_WIDTH + 8, 1),
        lowest=min(0, *(math.floor(10 * part.least) for _, part in parts)),
        highest=max(1, *(math.ceil(10 * part.most) for _, part in parts)),
    )
    count = math.ceil(len(parts) / math.ceil(len(parts) / _BARS_OF_A_PANEL))
    bars = [
        _bar(family, part, label, _TOP + index % count * _BAR_HEIGHT, scale)
        for index, ((family, part), label) in enumerate(zip(parts, labels, strict=True))
    ]
    return [
        Panel(
            width=round(scale.left + _PLOT_WIDTH + _NUMBERS_WIDTH, 1),
            height=_TOP + count * _BAR_HEIGHT,
            top=_TOP,
            label_end=scale.left - 8,
            zero=scale.at(0),
            ticks=scale.ticks(),
            bars=tuple(bars[start : start + count]),
        )
        for start in range(0, len(bars), count)
    ]


def _bar(family: Family, part: Spread, label: str, y: int, scale: _Scale) -> Bar:
    left, right = sorted((scale.at(0), scale.at(part.median)))
    return Bar(
        label=label,
        family=family.name,
        number=percent(part.median),
        title=_described(family, part),
        y=y,
        left=left,
        width=round(right - left, 1),
        least=scale.at(part.least),
        most=scale.at(part.most),
    )


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _described(family: Family, part: Spread) -> str:
    said = f"{family.name or UNMEASURED}: {percent(part.median)} saved"
    if part.models > 1:
        said += f", median of {part.models} models ({percent(part.least)} to {percent(part.most)})"
    if family.tune_by_deploy is not None:
        said += f"; Tune keeps {family.tune_by_deploy:.2f} times what Deploy keeps"
    return said
