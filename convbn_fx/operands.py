"""The operands of a convolution and of a batch norm in one normal form, whichever way a model spelt them."""

from typing import Any, NamedTuple


class Convolution(NamedTuple):
    """Operands of a functional convolution or linear layer, besides its input.

    The tensors are tensors at run time and graph nodes in a rewritten graph. `op` says which PyTorch function is
    meant (autocast treats `conv2d` and `convolution` differently): a key of
    [`OPERATIONS`][convbn_fx.functional.arithmetic.OPERATIONS].
    """

    op: str
    weight: Any
    bias: Any = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    transposed: bool = False
    output_padding: Any = 0
    groups: Any = 1


class BatchNorm(NamedTuple):
    """Operands of a batch norm with frozen statistics, besides its input: four vectors of shape (C,), and eps."""

    running_mean: Any
    running_var: Any
    weight: Any = None
    bias: Any = None
    eps: Any = 1e-5
