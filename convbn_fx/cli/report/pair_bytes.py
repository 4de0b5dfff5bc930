"""What each pair keeps for the backward pass by itself: its calls are written down in one run, and replayed alone.

A storage that several layers keep counts once in a whole model, and in the row of each pair that keeps it: the rows of
all pairs may add up to more than the model keeps. An activation that is part of the batch norm's class belongs to the
pair; an input that is a view counts as a tensor of its own.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from convbn_fx._torch import FakeCopyMode, FakeTensorMode, pytree
from convbn_fx.api import deploy, report, tune
from convbn_fx.functional.autocast import autocast_state, in_autocast_state
from convbn_fx.memory import saved_bytes


@dataclass(frozen=True)
class SavedBytes:
    """Bytes saved for the backward pass, of a model or of a pair.

    Attributes:
        eval: As the model is: convolution, then batch norm.
        tune: Of what [`tune`][convbn_fx.tune] makes of it.
        deploy: Of what [`deploy`][convbn_fx.deploy] makes of it.
    """

    eval: int
    tune: int
    deploy: int

    def to_json(self) -> dict[str, int]:
        """Plain types."""
        return {"eval": self.eval, "tune": self.tune, "deploy": self.deploy}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """Describes a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)

    def made(self) -> Tensor:
        """Such a tensor; in a `FakeTensorMode` it holds no memory."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return tensor.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Call:
    """One call of a convolution that a batch norm followed: its arguments, and what was around it.

    Attributes:
        args: Positional arguments, with a `TensorSpec` for each tensor.
        kwargs: Keyword arguments, likewise.
        grad_mode: Whether gradients were enabled.
        autocast: The dtype that autocast casts to, by type of device; None where it is off.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad_mode: bool
    autocast: dict[str, torch.dtype | None]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Describes a call that is about to be made."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        types = {tensor.device.type for tensor in tensors}
        args, kwargs = pytree.tree_map_only(Tensor, TensorSpec.of, (args, kwargs))
        return cls(args, kwargs, torch.is_grad_enabled(), {type_: autocast_state(type_) for type_ in types})

    def saved_by(self, module: nn.Module) -> int:
        """The bytes that a module keeps when it is called like this, inside of a `FakeTensorMode`."""
        args, kwargs = pytree.tree_map_only(TensorSpec, TensorSpec.made, (self.args, self.kwargs))
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad_mode))
            for device_type, dtype in self.autocast.items():
                stack.enter_context(in_autocast_state(device_type, dtype))
            return saved_bytes(module, *args, kwargs=kwargs)


Members = tuple[nn.Module, nn.Module]  # a convolution and the batch norm after it


class Recorder:
    """Writes down the calls of pairs of modules, and of deep copies of these modules, which share it.

    Attributes:
        calls: The calls of each pair, by the ids of its two modules (not those of copies).
    """

    def __init__(self) -> None:
        self.calls: defaultdict[tuple[int, int], list[Call]] = defaultdict(list)
        self._begun: dict[int, Call] = {}
        self._outputs = WeakTensorKeyDictionary()  # what is kept alive here would keep its graph

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        return self

    def calls_of(self, conv: nn.Module, norm: nn.Module) -> list[Call]:
        """The calls of one pair."""
        return self.calls.get((id(conv), id(norm)), [])

    def place_of(self, conv: nn.Module, norm: nn.Module) -> float:
        """The place of a pair in the order of first calls; that of pairs that were not called is behind all others."""
        places = {key: place for place, key in enumerate(self.calls)}
        return places.get((id(conv), id(norm)), math.inf)

    @contextmanager
    def watching(self, pairs: Collection[Members]) -> Iterator[None]:
        """Has hooks on the modules of pairs while it is open."""
        convs = {id(conv): conv for conv, _ in pairs}
        norms = {id(norm): norm for _, norm in pairs}
        handles: list[RemovableHandle] = []
        try:
            for key, conv in convs.items():
                begin, end = partial(self._begin, key), partial(self._end, key)
                handles.append(conv.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
                handles.append(conv.register_forward_hook(end))
            for key, norm in norms.items():
                follow = partial(self._follow, key)
                handles.append(norm.register_forward_pre_hook(follow, prepend=True, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, conv: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begun[conv] = Call.of(args, kwargs)

    def _end(self, conv: int, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        call = self._begun.pop(conv)
        if isinstance(output, Tensor):
            self._outputs[output] = conv, call

    def _follow(self, norm: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value in self._outputs:
                conv, call = self._outputs[value]
                self.calls[conv, norm].append(call)


class _Alone(nn.Module):
    """A convolution and a batch norm, and nothing around them."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.norm(self.conv(*args, **kwargs))


def saved_alone(conv: nn.Module, norm: nn.Module, calls: list[Call]) -> SavedBytes | None:
    """Counts what a pair keeps where nothing else runs, on fake tensors.

    Args:
        conv: The convolution.
        norm: The batch norm.
        calls: What the convolution is called with.

    Returns:
        The bytes, added up over the calls; None where there are none, or where the two are no pair by themselves.
    """
    pair = _Alone(conv, norm)
    tuned = tune(pair)
    if not calls or not report(tuned).fused:
        return None
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        variants = [copy.deepcopy(variant) for variant in (pair, tuned, deploy(pair))]
    with mode:
        return SavedBytes(*(sum(call.saved_by(variant) for call in calls) for variant in variants))
