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
METADATA = frozenset({"shape", "ndim", "dtype", "device", "size", "dim", "numel"})


class PairCounter(TorchFunctionMode):
    """Counts frozen batch norms whose input is a convolution's output that nothing else uses."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[int, int] = {}  # of each convolution's output, by id
        self.outputs: list[Tensor] = []  # kept alive, so that an id stays one tensor's
        self.normalised: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Looks at one call of a function."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # What reads a property is the __get__ of the property.
        if getattr(getattr(func, "__self__", func), "__name__", None) not in METADATA:
            self.count_uses((args, kwargs))
        if func in CONVOLUTIONS:
            self.outputs.append(result)
            self.uses[id(result)] = 0
        elif func is F.batch_norm and not _argument(args, kwargs, 5, "training", False):
            input = id(_argument(args, kwargs, 0, "input", None))
            self.normalised += [input] if input in self.uses else []
        return result

    def count_uses(self, values: Any) -> None:
        """Counts the convolutions' outputs among the values as used once more."""
        for value in pytree.tree_leaves(values):
            if id(value) in self.uses:
                self.uses[id(value)] += 1

    @property
    def pairs(self) -> int:
        """How many pairs ran."""
        return sum(self.uses[output] == 1 for output in self.normalised)


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
    counter.count_uses(output)
    pairs: int = counter.pairs
    return pairs
