"""Which pairs a model's forward really runs, told by watching its functions: the oracle that the pass is held to.

It knows nothing of modules, graphs or the table of kinds: one forward call, on the meta device, under a
`TorchFunctionMode` that sees every function PyTorch is asked for.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

CONVOLUTIONS = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d, torch.convolution, F.linear),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)
METADATA = frozenset(
    {
        *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__),
        *(Tensor.size, Tensor.dim, Tensor.numel),
    }
)


class PairCounter(TorchFunctionMode):
    """Counts frozen batch norms whose input is a convolution's output that nothing else uses.

    Attributes:
        batch_norms: Names of the batch norms, in order: which call of `F.batch_norm` it was, and of what width.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Any] = []  # kept alive, so that an id means one tensor
        self.convolved: set[int] = set()
        self.uses: dict[int, int] = {}
        self.normalised: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in METADATA:
            return result
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.uses[id(value)] = self.uses.get(id(value), 0) + 1
        if func in CONVOLUTIONS:
            self.convolved.add(id(result))
            self.uses[id(result)] = 0  # what had this id before is gone
            self.values.append(result)
        elif func is F.batch_norm and not _argument(args, kwargs, 5, "training", False):
            self.normalised.append(id(_argument(args, kwargs, 0, "input", None)))
        return result

    @property
    def pairs(self) -> int:
        """How many pairs ran."""
        return sum(value in self.convolved and self.uses[value] == 1 for value in self.normalised)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str, default: Any) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def count_pairs(model: nn.Module, *inputs: Any) -> int:
    """How many pairs one call of the model runs.

    Args:
        model: Any model; its batch norms in Eval mode count.
        *inputs: What it is called with; on the meta device nothing is computed.

    Returns:
        The number of calls of a frozen batch norm on the output of a convolution or linear layer, used nowhere else.
    """
    with torch.no_grad(), PairCounter() as counter:
        output = model(*inputs)
    for value in pytree.tree_leaves(output):
        if isinstance(value, Tensor):
            counter.uses[id(value)] = counter.uses.get(id(value), 0) + 1
    return counter.pairs
