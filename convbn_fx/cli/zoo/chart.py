"""The page's chart, memory saved by family: its scale, and which bars are in which panel. The template draws it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from convbn_fx.cli.zoo.summary import UNMEASURED, Family, Spread, percent

_PLOT_WIDTH = 190
_CHARACTER_WIDTH = 6.4
_LONGEST_LABEL = 32
_BARS_OF_A_PANEL = 26


@dataclass(frozen=True)
class Chart:
    """Bars from above, in panels side by side that have one scale. Its ends are tenths.

    Attributes:
        panels: The families of each.
        plot: Where the labels end, and the plot begins.
        lowest: The part at its left end.
        highest: The part at its right end.
    """

    panels: list[list[Family]]
    plot: float
    lowest: int
    highest: int

    @property
    def width(self) -> float:
        """Of a panel, with the numbers to the right of the plot."""
        return round(self.plot + _PLOT_WIDTH + 54, 1)

    def at(self, part: float) -> float:
        """The place of a part, rounded, so that the file is short and the same everywhere."""
        return round(self.plot + _PLOT_WIDTH * (10 * part - self.lowest) / (self.highest - self.lowest), 1)

    @property
    def ticks(self) -> range:
        """Round numbers of tenths, at most five steps apart; zero is one of them."""
        step = math.ceil((self.highest - self.lowest) / 5)
        return range(-(-self.lowest // step) * step, self.highest + 1, step)


def chart(families: Iterable[Family]) -> Chart | None:
    """Lays out the families whose memory was measured, the one that saves most first.

    Args:
        families: All families.

    Returns:
        The chart; None if nothing was measured.
    """
    parts = sorted((-part.median, family.name, family, part) for family in families if (part := family.saved))
    if not parts:
        return None
    measured = [family for _, _, family, _ in parts]
    count = math.ceil(len(measured) / math.ceil(len(measured) / _BARS_OF_A_PANEL))
    return Chart(
        panels=[measured[start : start + count] for start in range(0, len(measured), count)],
        plot=round(max(len(label(family)) for family in measured) * _CHARACTER_WIDTH + 8, 1),
        lowest=min(0, *(math.floor(10 * part.least) for *_, part in parts)),
        highest=max(1, *(math.ceil(10 * part.most) for *_, part in parts)),
    )


def label(family: Family) -> str:
    """Its name, shortened if it is long."""
    name = family.name or UNMEASURED
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def sentence(family: Family, part: Spread) -> str:
    """All numbers of a family, with the part of the memory that it saves."""
    said = f"{family.name or UNMEASURED}: {percent(part.median)} saved"
    if part.models > 1:
        said += f", median of {part.models} models ({percent(part.least)} to {percent(part.most)})"
    if family.tune_by_deploy is not None:
        said += f"; Tune keeps {family.tune_by_deploy:.2f} times what Deploy keeps"
    return said
