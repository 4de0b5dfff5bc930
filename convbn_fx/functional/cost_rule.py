"""The cost rule: which form of a pair is the cheapest at a call, decided from its sizes alone.

There are three. *Folded*: the scale goes to the weight, which is read and written several times. *Scaled*: it stays on
the output, and gamma's gradient is a sum over the weight. *Apart*: convolution and batch norm as in Eval mode, which
saves the convolution's output as well. So the smaller of weight and output decides between the first two; and apart
is for gamma's sake alone, where the output is smaller than the weight by so much, or so small, that not to save it is
not worth the time. Where the output is the larger of the two, a pair never saves it.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final


class Form(Enum):
    """How a convolution and a batch norm are computed."""

    FOLDED = auto()
    SCALED = auto()
    APART = auto()


@dataclass(frozen=True)
class Costs:
    """What a pair is worth on a kind of device, as `python -m bench costs` measures it.

    To be fused where the weight is the larger always takes longer than Eval mode does: the bookkeeping of a call, a sum
    over the weight. What it saves is the output.

    Attributes:
        fixed: An output of fewer elements is not worth the bookkeeping.
        weight_per_output: An element of output is not worth a sum over more elements of weight.
    """

    fixed: int
    weight_per_output: float


#: By type of device. On CPUs a call's bookkeeping is as long as Eval mode takes to normalise some hundred thousand
#: elements; less than that, because with these numbers a ResNet-50 saves no more than 1.01 times what Deploy mode does,
#: from four images of 224x224 pixels on. Those of CUDA wait for a measurement.
COSTS: Final[dict[str, Costs]] = {
    "cpu": Costs(fixed=1 << 16, weight_per_output=16.0),
    "cuda": Costs(fixed=0, weight_per_output=16.0),
}


def cheapest_form(weight_size: int, output_size: int, device_type: str, gamma_trains: bool) -> Form:
    """The form in which a pair is to run while gradients are recorded.

    Args:
        weight_size: Number of elements of the convolution's weight.
        output_size: Number of elements of its output.
        device_type: Such as `cpu`; one that is not in `COSTS` counts as `cuda`.
        gamma_trains: Whether gamma wants a gradient.

    Returns:
        The form; apart only if the output is smaller than the weight.
    """
    if weight_size <= output_size:
        return Form.FOLDED
    costs = COSTS.get(device_type, COSTS["cuda"])
    too_small = output_size < costs.fixed or weight_size > costs.weight_per_output * output_size
    return Form.APART if gamma_trains and too_small else Form.SCALED
