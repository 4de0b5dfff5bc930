"""Where a step's time goes: convolutions, batch norms, the fused function's own Python, and what is between operators.

The profiler slows everything down, the short most. So shares tell where to look; what is gained is told by timing.
"""

import re
import time
from collections.abc import Callable
from typing import Final

from torch.profiler import ProfilerActivity, profile

#: What an operator counts as, by the first pattern that is found in its name.
PARTS: Final = (
    (
        "Python of fused pairs",
        re.compile("^(_FusedConvolution(Backward)?$|convbn_fx::|torch::autograd::CppNode<convbn_fx::)"),
    ),
    ("convolutions", re.compile("conv(olution|[123]d|_)")),
    ("batch norms", re.compile("batch_norm")),
    ("sums and products", re.compile(r"aten::(sum|mul_?|add|addcmul|rsqrt|div)$")),
    ("other operators", re.compile("")),
)
BETWEEN: Final = "between operators"
_STEPS: Final = 5


def where_time_goes(step: Callable[[], None]) -> dict[str, float]:
    """Profiles some steps on the CPU.

    Args:
        step: The step; it runs once more, before.

    Returns:
        Seconds of a step, by part; what is between operators is Python's, the profiler's and the engine's.
    """
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        for _ in range(_STEPS):
            step()
        seconds = (time.perf_counter() - begin) / _STEPS
    parts = dict.fromkeys((name for name, _ in PARTS), 0.0)
    for event in profiler.key_averages():
        parts[part_of(event.key)] += event.self_cpu_time_total / 1e6 / _STEPS
    return {**parts, BETWEEN: max(seconds - sum(parts.values()), 0.0)}


def part_of(operator: str) -> str:
    """What the operator of that name counts as."""
    return next(name for name, pattern in PARTS if pattern.search(operator))
