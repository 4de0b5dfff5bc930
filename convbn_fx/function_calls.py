"""Pairs of functions: convolutions and batch norms that a forward calls as functions, not as modules.

There is no module to give a part to. While the forward that owns such pairs runs, a `TorchFunctionMode` sees the
functions it calls: a convolution called where one was discovered waits, as a module would, and a batch norm that is
called with one that waits is computed with it.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from convbn_fx import kinds
from convbn_fx.deferral import Pairing, defer, settled, waiting_in

#: Where a function is called: the module and the qualified name of the code that calls it.
Site = tuple[str, str]


def site_of_caller(frame: FrameType | None) -> Site | None:
    """The code that called PyTorch, seen from inside it; None where that is PyTorch's own."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(
            ("torch.nn.functional", "torch.overrides", "torch.fx", "torch._ops", "convbn_fx.")
        ):
            return (name, frame.f_code.co_qualname)
        frame = frame.f_back
    return None


class FunctionPairs(TorchFunctionMode):
    """What the forward of an owner runs in.

    Args:
        sites: Where it calls convolutions that batch norms follow.
    """

    def __init__(self, sites: dict[Site, Pairing]) -> None:
        super().__init__()
        self.sites = sites

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
        if func in kinds.CONVOLUTION_FUNCTIONS:
            pairing = self.sites.get(site_of_caller(sys._getframe(1)) or ("", ""))
            if pairing is not None and pairing.allows():
                args, kwargs = settled(args), settled(kwargs)
                return defer(*kinds.CONVOLUTION_FUNCTIONS[func].operands(*args, **kwargs), pairing)
        kind = kinds.BATCH_NORM_FUNCTIONS.get(func)
        if kind is not None and kind.output_index is None and any(map(waiting_in, (*args, *kwargs.values()))):
            input, training, norm = kind.operands(*args, **kwargs)
            waiting = waiting_in(input)
            if waiting is not None and training is False:
                normalised = waiting.taken_by(norm)
                if normalised is not None:
                    return normalised
        return func(*args, **kwargs)
