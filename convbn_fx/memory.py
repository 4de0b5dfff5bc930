"""Bytes that one forward call keeps for the backward pass, counted by storage.

Autograd hands every tensor that it saves to ``torch.autograd.graph.saved_tensors_hooks``; a handle is
returned in its place, and the handles still alive when the call returns tell what its graph holds. The
count is repeatable to the byte and the same for real and for fake tensors, so that large batches can be
counted on a laptop.

What hooks cannot see is not counted: tensors that a custom function keeps on ``ctx`` outside
``save_for_backward``, and whatever runs under inner hooks, such as the inside of
``torch.utils.checkpoint``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from convbn_fx._torch import FakeCopyMode, FakeTensor, FakeTensorMode, pytree

__all__ = ["saved_bytes"]

T = TypeVar("T")


def saved_bytes(
    model: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None, fake: bool = False
) -> int:
    """Count the bytes that one call of the model keeps for its backward pass.

    Each storage is counted once and whole. Those of the model's parameters and buffers are left out;
    those of the inputs are not: they are activations. Nothing is kept under ``torch.no_grad()``. The
    model's buffers and the random state are left as found.

    Args:
        model: any module, such as a ``torch.fx.GraphModule``; called once, in the mode it is in.
        *inputs: positional arguments of any nesting; their tensors are copied, ``requires_grad`` kept.
        kwargs: keyword arguments, treated alike.
        fake: run copies of model and inputs that hold no memory (``FakeTensorMode``). The inputs need
            hold none either: ``torch.empty(()).expand(256, 3, 224, 224)`` counts as a full batch. Leave
            it out where model and inputs are fake already.

    Returns:
        The number of bytes.

    Raises:
        Exception: whatever the model raises; with ``fake`` also what ``FakeTensorMode`` raises where
            control flow asks for the value of a tensor.

    Example:
        ```python
        import torch
        from convbn_fx.memory import saved_bytes

        model = torch.nn.Conv2d(3, 8, 3)
        images = torch.zeros(2, 3, 16, 16)
        assert saved_bytes(model, images) == images.nbytes  # for the gradient of the weight

        batch = torch.empty(()).expand(256, 3, 224, 224)  # holds no memory
        assert saved_bytes(model, batch, fake=True) == 4 * 256 * 3 * 224 * 224
        ```
    """
    keywords = dict(kwargs or {})
    if not fake:
        with _buffers_and_random_state_kept(model):
            saved = saved_storages(model, inputs, keywords)
    else:
        mode = FakeTensorMode()
        with FakeCopyMode(mode):
            model, inputs, keywords = copy.deepcopy((model, inputs, keywords))
        with mode:
            saved = saved_storages(model, inputs, keywords)
    return sum(saved.get(None, {}).values())


class _Packed:
    """What autograd holds in the place of a saved tensor; dies with the graph."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the tensor itself may own the graph that owns this

    def unpack(self) -> Tensor:
        return self.tensor


def saved_storages(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    saved_by: Callable[[], T | None] = lambda: None,
) -> dict[T | None, dict[int, int]]:
    """What [`saved_bytes`][convbn_fx.memory.saved_bytes] counts, storage by storage; nothing is left as found.

    Args:
        model: what is called.
        inputs: its positional arguments.
        kwargs: its keyword arguments.
        saved_by: asked who is running, whenever a tensor is saved.

    Returns:
        For each answer of `saved_by`, the sizes of the storages in bytes, by their addresses.
    """
    copies: dict[int, Tensor] = {}  # a tensor that is passed twice stays one tensor

    def copied(tensor: Tensor) -> Tensor:  # not a leaf, so that the model may change it in place
        fresh = tensor.detach().requires_grad_(tensor.requires_grad).clone()
        return copies.setdefault(id(tensor), fresh)

    alive: WeakKeyDictionary[_Packed, T | None] = WeakKeyDictionary()

    def pack(tensor: Tensor) -> _Packed:
        packed = _Packed(tensor)
        alive[packed] = saved_by()
        return packed

    inputs, kwargs = pytree.tree_map_only(Tensor, copied, (inputs, kwargs))
    own = [tensor.untyped_storage() for tensor in chain(model.parameters(), model.buffers())]
    with torch.autograd.graph.saved_tensors_hooks(pack, _Packed.unpack):
        outputs = model(*inputs, **kwargs)
    kept = [(who, packed.tensor.untyped_storage()) for packed, who in alive.items()]
    del outputs  # only now: it holds the graph, which holds what was packed
    uncounted = {storage._cdata for storage in own}
    saved: dict[T | None, dict[int, int]] = {}
    for who, storage in kept:
        if storage._cdata not in uncounted:
            saved.setdefault(who, {})[storage._cdata] = storage.nbytes()
    return saved


@contextmanager
def _buffers_and_random_state_kept(model: nn.Module) -> Iterator[None]:
    contents = [
        (buffer, buffer.detach().clone())
        for buffer in model.buffers()
        if not (buffer.is_meta or isinstance(buffer, FakeTensor))  # these hold no values
    ]
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for buffer, content in contents:
                if not torch.equal(buffer, content):
                    buffer.data.copy_(content)  # .data: graphs of the caller must not see a new version
