"""Where another contender is better than Tune: a page that a library measures itself on has to say so."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from bench.harness.contenders import COMPILED_CONVBN, PAIRS, TUNE, TUNE_CHECKPOINT
from bench.harness.timing import ratio

#: These are Tune mode, too.
OURS: Final = (TUNE, PAIRS, TUNE_CHECKPOINT, COMPILED_CONVBN)
#: Bytes are exact; what is within a hundredth of Tune's is no reason to pick another.
SMALLER: Final = 0.99


class Case(NamedTuple):
    """One comparison, as a line of a table has it.

    Attributes:
        label: What is compared at, such as `resnet50, 2x224`.
        bytes: By contender; None where it was not counted.
        seconds: By contender those of each round, position by position the same rounds; None where it was not timed.
    """

    label: str
    bytes: Mapping[str, int | None]
    seconds: Mapping[str, Sequence[float] | None]


class Advantage(NamedTuple):
    """What a contender takes less of, and where.

    Attributes:
        contender: Its name.
        what: `memory` or `time`.
        places: The cases' labels, and what it takes there as a fraction of Tune's.
        of: How many cases it was compared in.
    """

    contender: str
    what: str
    places: Mapping[str, float]
    of: int


def advantages(cases: Iterable[Case]) -> list[Advantage]:
    """Finds the contenders that take less memory, or less time in three rounds of four, and where.

    Args:
        cases: What was compared.

    Returns:
        One for each contender and advantage; memory first.
    """
    smaller: dict[str, dict[str, float | None]] = {}
    faster: dict[str, dict[str, float | None]] = {}
    for case in cases:
        for contender, of_tune in _byte_ratios(case):
            smaller.setdefault(contender, {})[case.label] = of_tune if of_tune < SMALLER else None
        for contender, of_tune in _time_ratios(case):
            faster.setdefault(contender, {})[case.label] = of_tune.median if of_tune.upper < 1 else None
    found = []
    for what, by_contender in (("memory", smaller), ("time", faster)):
        for contender, compared in by_contender.items():
            places = {label: of_tune for label, of_tune in compared.items() if of_tune is not None}
            if places:
                found.append(Advantage(contender, what, places, len(compared)))
    return found


def better_than_tune(cases: Iterable[Case]) -> Iterator[str]:
    """Says of [`advantages`][bench.harness.better.advantages] what they are.

    Args:
        cases: What was compared.

    Yields:
        A sentence for each contender and advantage.
    """
    for contender, what, places, _ in advantages(cases):
        where = "; ".join(f"{label} ({of_tune:.2f})" for label, of_tune in places.items())
        yield f"{contender} takes less {what}: {where}."


def _byte_ratios(case: Case) -> Iterator[tuple[str, float]]:
    of_tune = case.bytes.get(TUNE)
    for contender, count in case.bytes.items():
        if of_tune and count is not None and contender not in OURS:
            yield contender, count / of_tune


def _time_ratios(case: Case) -> Iterator[tuple[str, Any]]:
    of_tune = case.seconds.get(TUNE)
    for contender, seconds in case.seconds.items():
        if of_tune and seconds and contender not in OURS:
            yield contender, ratio(seconds, of_tune)
