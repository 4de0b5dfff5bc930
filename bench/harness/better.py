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


def better_than_tune(cases: Iterable[Case]) -> Iterator[str]:
    """Names the contenders that take less memory, or less time in three rounds of four, and where.

    Args:
        cases: What was compared.

    Yields:
        A sentence for each contender and advantage.
    """
    smaller: dict[str, list[str]] = {}
    faster: dict[str, list[str]] = {}
    for case in cases:
        for contender, of_tune in _byte_ratios(case):
            if of_tune < SMALLER:
                smaller.setdefault(contender, []).append(f"{case.label} ({of_tune:.2f})")
        for contender, of_tune in _time_ratios(case):
            if of_tune.upper < 1:
                faster.setdefault(contender, []).append(f"{case.label} ({of_tune.median:.2f})")
    for advantage, found in (("takes less memory", smaller), ("takes less time", faster)):
        for contender, places in found.items():
            yield f"{contender} {advantage}: {'; '.join(places)}."


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
