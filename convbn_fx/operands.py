"""The operands of a convolution, a batch norm, an activation in one normal form, whichever way a model spelt them."""

from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from torch import Tensor

if TYPE_CHECKING:  # typing's own takes a default from Python 3.13 on
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Tensor)
else:
    from typing import TypeVar

    T = TypeVar("T")


class Convolution(NamedTuple, Generic[T]):
    """Operands of a functional convolution or linear layer, besides its input.

    `T` is a tensor at run time, and a node in a graph, where numbers may be nodes as well. `op` says which PyTorch
    function is meant (autocast treats `conv2d` and `convolution` differently): a key of
    [`OPERATIONS`][convbn_fx.functional.arithmetic.OPERATIONS].
    """

    op: str
    weight: T
    bias: T | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    transposed: bool = False
    output_padding: Any = 0
    groups: Any = 1


class BatchNorm(NamedTuple, Generic[T]):
    """Operands of a batch norm with frozen statistics, besides its input: four vectors of shape (C,), and eps."""

    running_mean: T
    running_var: T
    weight: T | None = None
    bias: T | None = None
    eps: Any = 1e-5


class Activation(NamedTuple):
    """An activation function: its kind, the numbers that it depends on, and whether it overwrites its input.

    `kind` is the name of PyTorch's function: `relu`, `hardtanh`, `leaky_relu`, `elu`, `hardsigmoid`, `sigmoid`,
    `tanh`, `silu`, `hardswish`, `gelu`, `gelu_tanh`, `mish`. Or `composed_silu`, `composed_hardswish`,
    `composed_hardsigmoid`, `composed_mish`: the same, composed of other functions. Numbers are the bounds of a
    hardtanh, the slope of a leaky_relu, the alpha of an elu.
    """

    kind: str
    numbers: tuple[float, ...] = ()
    inplace: bool = False
