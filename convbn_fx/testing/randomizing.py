"""Batch norms as they are after training, in models whose weights are random."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from convbn_fx._torch import FakeTensor

ModuleT = TypeVar("ModuleT", bound=nn.Module)

#: How each tensor of a batch norm is made from a standard normal and a uniform [0, 1) draw.
_DRAWS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "running_mean": lambda normal, _: 0.3 * normal,
    "running_var": lambda _, uniform: 0.5 + uniform,
    "weight": lambda normal, uniform: (0.5 + uniform).copysign(normal),
    "bias": lambda normal, _: 0.3 * normal,
}


def randomize_batchnorms(model: ModuleT, seed: int = 0) -> ModuleT:
    """Make the running statistics and affine parameters of every batch norm non-trivial, in place.

    A batch norm is any module with the attributes ``running_mean`` and ``running_var``, whatever its
    class and even where they are None; ``num_batches_tracked`` is left alone. Fresh layers have mean 0,
    variance 1, scale 1 and shift 0, and hide most mistakes one can make about them. Drawn are means and
    shifts from N(0, 0.3^2), variances from U(0.5, 1.5), scales from U(0.5, 1.5) with either sign:
    moderate, so that deep networks stay finite.

    Args:
        model: the model; each of its modules is visited once, in the order of ``model.modules()``.
        seed: of a CPU generator; the values, drawn in float64, depend on neither device nor dtype.

    Returns:
        The same model. Meta and fake tensors, which hold no values, are left as they are.

    Example:
        ```python
        import torch
        from convbn_fx.testing import randomize_batchnorms

        norm = randomize_batchnorms(torch.nn.BatchNorm2d(8))
        assert norm.running_mean.abs().min() > 0 and norm.running_var.min() >= 0.5
        ```
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not (hasattr(module, "running_mean") and hasattr(module, "running_var")):
            continue
        for name, draw in _DRAWS.items():
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and not (tensor.is_meta or isinstance(tensor, FakeTensor)):
                normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                with torch.no_grad():
                    tensor.copy_(draw(normal, uniform))
    return model
