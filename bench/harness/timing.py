"""Timing that a busy machine does not spoil: the contenders take turns, and each round gives one ratio."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Ratio(NamedTuple):
    """Median and quartiles of the rounds' ratios."""

    median: float
    lower: float
    upper: float


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 2,
    max_rounds: int = 100,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times several functions in alternation.

    A round runs each of them once, in an order that is drawn anew for each round, so that none always profits from
    what its predecessor leaves in the caches. One round before the first is not counted.

    Args:
        steps: What to time, by name.
        seconds: No round begins when so much time has passed.
        min_rounds: But so many rounds are run in any case.
        max_rounds: And no more than these, whose quartiles are settled.
        clock: Tells the time in seconds.

    Returns:
        By name the seconds of each round; position i is round i in all of them.
    """
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    deadline = clock() + seconds
    orders = random.Random(0)  # noqa: S311 - the same orders in every run
    for rounds in range(max_rounds):
        if rounds >= min_rounds and clock() >= deadline:
            break
        for name in orders.sample(list(steps), len(steps)):
            start = clock()
            steps[name]()
            times[name].append(clock() - start)
    return times


def ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compares two functions round by round.

    Args:
        times: Seconds per round, two rounds at least.
        reference: The same of what is compared against.

    Returns:
        The median of `times / reference` over the rounds, and the quartiles around it.
    """
    ratios = [time / other for time, other in zip(times, reference, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, lower, upper)
