"""Switching batch norms, and nothing else, between Train and Eval mode."""

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from torch import nn

from convbn_fx import kinds


def selected(model: nn.Module, modules: Iterable[str] | None, function: str) -> tuple[str, ...]:
    """Checks names of sub-modules that a user has given.

    Args:
        model: The user's model.
        modules: Qualified names in it, or None for the model itself.
        function: Whose argument it is, for the messages.

    Returns:
        The names; the empty one is the model's own.

    Raises:
        TypeError: `model` is no module, or `modules` is one name instead of several.
        ValueError: A name is not that of a sub-module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(modules, str):
        raise TypeError(f"{function}: modules is a list of names, not one name: modules=[{modules!r}]")
    names = ("",) if modules is None else tuple(modules)
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{function}: {type(model).__name__} has no sub-module {', '.join(map(repr, unknown))}. "
            f"Its own are: {', '.join(name for name, _ in model.named_children())}"
        )
    return names


def batch_norms(model: nn.Module, names: Iterable[str]) -> Iterator[nn.Module]:
    """The batch norms inside the named sub-modules, each once."""
    seen: set[int] = set()
    for name in names:
        for module in model.get_submodule(name).modules():
            if kinds.resembles_batch_norm(module) and id(module) not in seen:
                seen.add(id(module))
                yield module


class batchnorm_mode:  # noqa: N801 - used like a function, as torch.no_grad is
    """Puts the batch norms of a model in Train or Eval mode and leaves all other modules in theirs.

    A call does it for good; as a context manager it puts every batch norm back into the mode that it was in. To
    alternate Train and Tune mode during pre-training (arXiv 2305.11624, appendix K) is to alternate `train`.

    Args:
        model: Any model, tuned or not.
        train: True for Train mode (statistics of the batch), False for Eval mode (frozen statistics).
        modules: Names of the sub-modules whose batch norms are meant, such as `["layer4"]`; all by default.

    Raises:
        TypeError: `model` is not a module, or `modules` is a single string.
        ValueError: One of `modules` names no sub-module.

    Example:
        ```python
        import torch
        import convbn_fx

        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Dropout())
        model = convbn_fx.tune(model, include_training=True).train()

        convbn_fx.batchnorm_mode(model, train=False)  # Tune mode from here on
        assert not model[1].training and model[2].training
        with convbn_fx.batchnorm_mode(model, train=True):
            model(torch.randn(2, 3, 8, 8))  # the statistics follow the data in here
        assert model[1].num_batches_tracked == 1 and not model[1].training
        ```
    """

    def __init__(self, model: nn.Module, train: bool = False, modules: Iterable[str] | None = None) -> None:
        self._model = model
        names = selected(model, modules, "batchnorm_mode")
        self._modes = [(module, module.training) for module in batch_norms(model, names)]
        for module, _ in self._modes:
            module.training = train

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for module, training in self._modes:
            module.training = training
