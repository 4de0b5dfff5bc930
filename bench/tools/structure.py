"""Which pairs a model's forward really runs, told by watching its functions: the oracle that the pass is held to.

It knows nothing of modules, graphs or the table of kinds: one forward call, on the meta device, under a
`TorchFunctionMode` that sees every function PyTorch is asked for. `python -m bench.tools.structure` holds `tune`, or
with `--compiled` the backend, to it for every architecture of timm's.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import convbn_fx

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


# --- The whole of timm -------------------------------------------------------------------------------------------


def on_meta(name: str) -> tuple[nn.Module, Tensor]:
    """An architecture of timm's in Eval mode and a batch of two of its own size, on the meta device."""
    with torch.device("meta"):
        model: Any = timm.create_model(name).eval()
        return model, torch.empty(2, *model.default_cfg["input_size"])


def count_fused(model: nn.Module, images: Tensor, compiled: bool) -> int:
    """How many pairs are fused in a model by `tune`, or in its compiled graphs by the backend."""
    if not compiled:
        return len(convbn_fx.report(convbn_fx.tune(model)).fused)
    torch._dynamo.reset()
    candidate = torch.compile(model, backend="convbn")
    with torch.no_grad():
        candidate(images)
    return len(convbn_fx.report(model).fused)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a batch norm of any class is in the model."""
    return any("BatchNorm" in cls.__name__ for module in model.modules() for cls in type(module).__mro__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares the pairs that run with those that are fused, for every architecture with a batch norm.

    Args:
        arguments: The command line's.

    Returns:
        The exit status: 1 if any pair was missed, or any too many were claimed.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.tools.structure", description=main.__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="names of architectures, such as 'resnet*'")
    parser.add_argument(
        "--compiled", action="store_true", help="in the graphs of torch.compile instead of by tune"
    )
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    models = pairs = 0
    wrong = []
    for name in timm.list_models(options.pattern):
        model, images = on_meta(name)
        if not has_batch_norm(model):
            continue
        run, fused = count_pairs(model, images), count_fused(model, images, options.compiled)
        models, pairs = models + (run > 0), pairs + run
        wrong += [name] if run != fused else []
        console.print(f"{name}: {fused} of {run} pairs fused")
    listed = ", ".join(wrong) or "none"
    console.print(f"{pairs} pairs in {models} models; not all or too many in {len(wrong)}: {listed}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
