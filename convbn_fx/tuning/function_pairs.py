"""Pairs of functions: convolutions and batch norms that a forward calls as functions, not as modules.

There is no module to give a part to. A functional convolution is told from all others by the module whose forward
calls it, and by the number of the call in that forward. While such a forward runs, a `TorchFunctionMode` sees the
functions it calls: a convolution of a number that was discovered waits, as a module would, and a batch norm that is
called with one that waits is computed with it.

What other modules call meanwhile is not counted. Where a forward goes another way than any that was explored, another
convolution may have the number; if it waits for a batch norm that does not come, it is computed when it is read.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from convbn_fx import kinds
from convbn_fx.tuning.deferred import Deferred, Pairing, Uncounted, defer, materialized, running


class FunctionPairs(TorchFunctionMode):
    """What a forward that calls functions of pairs runs in.

    Args:
        caller: The module whose forward it is.
        pairings: Of the convolutions that batch norms follow, by method and number.
        method: The method that runs.
    """

    def __init__(self, caller: nn.Module, pairings: Mapping[tuple[str, int], Pairing], method: str) -> None:
        super().__init__()
        self.caller = caller
        self.pairings = pairings
        self.method = method
        self.number = 0

    def __enter__(self) -> "FunctionPairs":
        self.outer, running.counter = running.counter, self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        running.counter = self.outer
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a part of the forward is compiled by itself
            return func(*args, **kwargs)
        if func in kinds.CONVOLUTION_FUNCTIONS and running.counter is self:
            pairing = self.pairings.get((self.method, self.number))
            self.number += 1
            if pairing is not None and (surroundings := pairing.allows()) is not None:
                args, kwargs = materialized(args), materialized(kwargs)
                operands = kinds.CONVOLUTION_FUNCTIONS[func].operands(*args, **kwargs)
                return defer(*operands, pairing, surroundings)
        kind = kinds.BATCH_NORM_FUNCTIONS.get(func)
        if (
            kind is not None
            and kind.output_index is None
            and Deferred in map(type, (*args, *kwargs.values()))
        ):
            input, training, norm = kind.operands(*args, **kwargs)
            if type(input) is Deferred and training is False:
                normalised = input.waiting.normalized_by(norm)
                if normalised is not None:
                    return normalised
        return func(*args, **kwargs)


def while_running(
    module: nn.Module, pairings: Mapping[tuple[str, int], Pairing] | None, method: str
) -> AbstractContextManager[Any]:
    """What a module's method runs in, so that its functions are counted as the module's.

    Args:
        module: The module.
        pairings: Those of the functions that it calls; None where only a module around it calls such.
        method: The method.
    """
    if pairings is None:
        return Uncounted()
    if running.counter is not None and running.counter.caller is module:
        return nullcontext()  # one of its methods has been entered before
    return FunctionPairs(module, pairings, method)
