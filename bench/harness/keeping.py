"""Which pair of a model saves what for the backward pass: what two pairs save is in memory once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from convbn_fx.cli.report.pair_bytes import storages_by_module
from convbn_fx.records import Pair


class Keeping(NamedTuple):
    """Bytes that one forward pass saves, parameters and buffers apart, each storage once.

    Attributes:
        alone: What each pair saves.
        shared: What an earlier pair saves already of it.
        others: What no pair saves.
    """

    alone: list[int]
    shared: list[int]
    others: int


def keeping(model: nn.Module, shape: Sequence[int], pairs: Sequence[Pair]) -> Keeping:
    """Runs a model on tensors that hold no memory, and asks of each saved storage which pairs save it.

    Args:
        model: In any mode: with its pairs as two modules each, fused, as one convolution.
        shape: Of its input.
        pairs: Its pairs.

    Returns:
        The bytes.
    """
    names = [name for pair in pairs for name in (pair.convolution, pair.batch_norm)]
    saved = storages_by_module(model, (torch.empty(()).expand(*shape),), names)
    alone, shared = [], []
    seen: set[int] = set()
    for pair in pairs:
        own = saved.get(pair.convolution, {}) | saved.get(pair.batch_norm, {})
        alone.append(sum(own.values()))
        shared.append(sum(size for storage, size in own.items() if storage in seen))
        seen |= own.keys()
    return Keeping(
        alone,
        shared,
        sum(size for storage, size in saved.get(None, {}).items() if storage not in seen),
    )
