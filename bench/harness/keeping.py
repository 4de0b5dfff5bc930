"""Which pair of a model saves what for the backward pass: what two pairs save is in memory once."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from convbn_fx.functional import conv_batch_norm
from convbn_fx.report import Pair


class Keeping(NamedTuple):
    """Bytes that one forward pass saves, parameters and buffers apart, each storage once.

    Attributes:
        shared: By the name of each pair's convolution, what an earlier pair saves already.
        others: What no pair saves.
    """

    shared: dict[str, int]
    others: int


def keeping(graph: GraphModule, shape: Sequence[int], pairs: Collection[Pair]) -> Keeping:
    """Runs a graph on tensors that hold no memory, and asks of each saved storage which pairs save it.

    Args:
        graph: A traced model in any mode: with its pairs as two modules each, as fused functions, as one convolution.
        shape: Of its input.
        pairs: Its pairs.

    Returns:
        The bytes.
    """
    pair_of = {name: pair.convolution for pair in pairs for name in (pair.convolution, pair.batch_norm)}
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        graph = copy.deepcopy(graph)
    watching = _Watching(graph, pair_of)
    with mode, torch.autograd.graph.saved_tensors_hooks(watching.pack, _Packed.unpack):
        outputs = watching.run(torch.empty(tuple(shape)))
    own = {_storage(tensor) for tensor in (*graph.parameters(), *graph.buffers())}
    sizes: dict[int, int] = {}
    by_pair: dict[str | None, set[int]] = {pair.convolution: set() for pair in pairs} | {None: set()}
    for packed, pair in watching.alive.items():
        storage = _storage(packed.tensor)
        if storage not in own:
            sizes[storage] = packed.tensor.untyped_storage().nbytes()
            by_pair[pair].add(storage)
    del outputs  # only now: its graph holds what was packed
    others = by_pair.pop(None)
    seen: set[int] = set()
    shared = {}
    for pair, storages in by_pair.items():
        shared[str(pair)] = sum(sizes[storage] for storage in storages & seen)
        seen |= storages
    return Keeping(shared, sum(sizes[storage] for storage in others - seen))


class _Packed:
    """What autograd holds in the place of a saved tensor; dies with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()

    def unpack(self) -> Tensor:
        return self.tensor


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


class _Watching(Interpreter):
    """Runs a graph and writes down which pair each saved tensor belongs to: None for none."""

    def __init__(self, graph: GraphModule, pair_of: Mapping[str, str]) -> None:
        super().__init__(graph)
        self.alive: WeakKeyDictionary[_Packed, str | None] = WeakKeyDictionary()
        self._pair_of = pair_of
        self._pair: str | None = None

    def run_node(self, n: Node) -> Any:
        """Runs a node as part of its pair."""
        # The first operand of a fused pair is its convolution.
        node = n.args[0] if n.target is conv_batch_norm else n
        self._pair = self._pair_of.get(str(node.target)) if isinstance(node, Node) else None
        return super().run_node(n)

    def pack(self, tensor: Tensor) -> _Packed:
        """What autograd calls with each tensor that it saves."""
        packed = _Packed(tensor)
        self.alive[packed] = self._pair
        return packed
