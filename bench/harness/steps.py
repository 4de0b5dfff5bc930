"""One training step, and what it costs: bytes saved for the backward pass, the peak, the time."""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness.timing import take_turns
from convbn_fx.memory import saved_bytes


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


def training_step(model: nn.Module, batch: Any) -> Callable[[], None]:
    """A forward and backward pass that takes its gradients away again."""
    model.to(memory_format=torch.channels_last)

    def step() -> None:
        total(model(batch)).backward()
        # Afterwards, so that contenders that share parameters find none, and a step's peak counts its own.
        for parameter in model.parameters():
            parameter.grad = None

    return step


def count(model: nn.Module, shape: Sequence[int]) -> int:
    """Bytes that one call keeps for the backward pass, counted on tensors that hold no memory."""
    return saved_bytes(model, images(shape, "cpu", fake=True), fake=True)


def counted_peak(model: nn.Module, shape: Sequence[int]) -> int:
    """Bytes that a step holds at most besides parameters, buffers and images, on tensors that hold no memory.

    It follows every tensor of both passes: activations, gradients, and what regions that are recomputed hide from
    [`count`][bench.harness.steps.count]. What an operator allocates and frees inside of itself it cannot see: a
    convolution's workspace, a weight in another layout. And it sees the sum of two gradients as a third tensor, where
    autograd, with nobody watching, may add in place.
    """
    return _allocated(model, shape)[1]


def counted_held(model: nn.Module, shape: Sequence[int]) -> int:
    """Bytes that are held between forward and backward besides parameters, buffers, images and the output.

    What [`count`][bench.harness.steps.count] tells, and what regions that are recomputed hide from it.
    """
    return _allocated(model, shape)[0]


def _allocated(model: nn.Module, shape: Sequence[int]) -> tuple[int, int]:
    """Bytes that are held between forward and backward, and at the peak of both."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(model)
    with mode:
        batch = torch.empty(tuple(shape))
        if batch.ndim == 4:
            batch = batch.to(memory_format=torch.channels_last)
        allocations = _Allocations((*model.parameters(), *model.buffers(), batch))
        with allocations:
            outputs = model(batch)
            held = allocations.now - sum(
                leaf.untyped_storage().nbytes() for leaf in pytree.tree_leaves(outputs)
            )
            result = total(outputs)
            del outputs
            result.backward()
    return held, allocations.peak


class _Allocations(TorchDispatchMode):
    """Adds up the storages that operators make, for as long as they live.

    PyTorch's own `MemTracker` has global hooks on modules, under which a fused pair runs as Eval mode's two modules.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.now = 0
        self._alive = {id_: weakref.ref(storage) for id_, storage in map(_storage, known)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(results):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self.peak = max(self.peak, self.now)
        return results

    def _add(self, tensor: Tensor) -> None:
        id_, storage = _storage(tensor)
        if id_ not in self._alive:
            self.now += storage.nbytes()
            self._alive[id_] = weakref.ref(storage, partial(self._remove, id_, storage.nbytes()))

    def _remove(self, id_: int, size: int, _storage: Any) -> None:
        del self._alive[id_]
        self.now -= size


def _storage(tensor: Tensor) -> tuple[int, torch.UntypedStorage]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage


def peak(step: Callable[[], None], device: str) -> int:
    """Bytes that a step allocates at most, above what there is before it.

    Args:
        step: The step; it runs twice.
        device: Where it runs. On a CPU the profiler tells, which slows the step down.

    Returns:
        The bytes, operators' own temporary ones included.
    """
    if device == "cpu":
        step()
        return _profiled_peak(step)
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _profiled_peak(step: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    highest = now = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()  # negative where memory is freed
        highest = max(highest, now)
    return highest


def times(steps: Mapping[str, Callable[[], object]], seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds of each round, the contenders in turns."""

    def synchronised(step: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            step()
            torch.cuda.synchronize()

        return run

    if device == "cuda":
        steps = {name: synchronised(step) for name, step in steps.items()}
    return take_turns(steps, seconds=seconds)
