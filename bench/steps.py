"""One training step, and what it costs: bytes saved for the backward pass, the peak, the time."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils import _pytree as pytree

from bench.timing import take_turns
from convbn_fx.memory import saved_bytes

Loss = Callable[[Any], Tensor]


def total(outputs: Any) -> Tensor:
    """A scalar that every output has a part in."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    result: Tensor = sum((leaf.float().sum() for leaf in leaves[1:]), leaves[0].float().sum())
    return result


def images(shape: Sequence[int], device: str, *, fake: bool = False) -> Tensor:
    """A batch of random images in channels_last; one that holds no memory if it is for counting."""
    if fake:
        return torch.empty((), device=device).expand(tuple(shape))
    batch = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(device)
    return batch.to(memory_format=torch.channels_last) if batch.ndim == 4 else batch


def training_step(model: nn.Module, batch: Any, loss: Loss = total) -> Callable[[], None]:
    """A forward and backward pass that takes its gradients away again."""
    model.to(memory_format=torch.channels_last)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        loss(model(batch)).backward()

    return step


def count(model: nn.Module, shape: Sequence[int]) -> int:
    """Bytes that one call keeps for the backward pass, counted on tensors that hold no memory."""
    return saved_bytes(model, images(shape, "cpu", fake=True), fake=True)


def counted_peak(model: nn.Module, shape: Sequence[int], loss: Loss = total) -> int:
    """Bytes that a step holds at most besides parameters and buffers, on tensors that hold no memory.

    It follows every tensor of both passes: temporary ones, gradients, and what regions that are recomputed hide from
    [`count`][bench.steps.count].
    """
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model, batch = copy.deepcopy((model, images(shape, "cpu", fake=True)))
    tracker = MemTracker()
    with mode:
        tracker.track_external(model, batch)
        with tracker:
            loss(model(batch)).backward()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    before = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers(), batch)
    }
    return snapshot["Total"] - sum(before.values())


def peak(step: Callable[[], None]) -> int | None:
    """Bytes of CUDA memory that a step allocates at most, above what there is before it; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def times(steps: Mapping[str, Callable[[], None]], seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds of each round, the contenders in turns."""

    def synchronised(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            step()
            torch.cuda.synchronize()

        return run

    if device == "cuda":
        steps = {name: synchronised(step) for name, step in steps.items()}
    return take_turns(steps, seconds=seconds)
