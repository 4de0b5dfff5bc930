"""What a batch norm multiplies its convolution by: the coefficients, and what folding them does to float16's range.

The coefficients `gamma / sqrt(var + eps)` of pretrained networks spread over orders of magnitude (arXiv 2305.11624,
figure 2a). Folded into a weight they may carry it out of the range of float16, whose numbers end at 65504 and lose
digits below 6.1e-5.

[`tune`][convbn_fx.tune] folds nothing in float16 and bfloat16: there the scale stays on the convolution's output, as in
Eval mode. The range is a concern of [`deploy`][convbn_fx.deploy] alone, run in half precision.
"""

import math
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn

from convbn_fx import kinds
from convbn_fx._torch import ConvTransposeBase, FakeTensor
from convbn_fx.functional.arithmetic import inverse_deviation, output_channels, scale_of
from convbn_fx.functional.folding import fold
from convbn_fx.operands import BatchNorm, Convolution

LARGEST: Final = torch.finfo(torch.float16).max
SMALLEST_NORMAL: Final = torch.finfo(torch.float16).smallest_normal

#: The share of a weight's elements that may fall below the smallest normal number by folding: of a normal distribution,
#: some always lie near zero and do no harm.
TOLERATED_LOSS: Final = 0.1

FLOAT16_CURE: Final = (
    "run what deploy() returns in bfloat16 or float32, or leave the model to tune(): in half precision it keeps the "
    "scale on the convolution's output, as Eval mode does, and folds nothing into the weight"
)


@dataclass(frozen=True)
class Coefficients:
    """The coefficients `gamma / sqrt(var + eps)` of one batch norm, or of several together.

    Attributes:
        values: One per channel, computed in float64, with their signs.
    """

    values: tuple[float, ...]

    @property
    def magnitudes(self) -> list[float]:
        """Their finite magnitudes, zeros included."""
        return [abs(value) for value in self.values if math.isfinite(value)]

    def to_json(self) -> dict[str, Any]:
        """How many there are, and their magnitudes in short; None where none is finite."""
        magnitudes = self.magnitudes
        return {
            "channels": len(self.values),
            "smallest": min(magnitudes, default=None),
            "median": median(magnitudes) if magnitudes else None,
            "largest": max(magnitudes, default=None),
            "negative": sum(value < 0 for value in self.values),
            "zero": magnitudes.count(0),
            "not_finite": len(self.values) - len(magnitudes),
        }


@dataclass(frozen=True)
class Float16Range:
    """How the folded parameters of one pair lie in the range of float16.

    Attributes:
        largest_weight: The largest magnitude in the folded weight, folded in float64; infinite if any is not finite.
        largest_bias: The same of the folded bias.
        lost: The share of the nonzero weights that fall below float16's smallest normal number only by folding.
    """

    largest_weight: float
    largest_bias: float
    lost: float

    @property
    def overflows(self) -> bool:
        """Whether a folded parameter is larger than float16's largest number."""
        return max(self.largest_weight, self.largest_bias) > LARGEST

    @property
    def underflows(self) -> bool:
        """Whether so many weights lose digits by folding that it matters."""
        return self.lost > TOLERATED_LOSS

    @property
    def warning(self) -> str:
        """What is out of range and by how much; empty where nothing is."""
        parts = [
            f"the folded {name} reaches {value:.3g}, beyond {LARGEST:.0f}"
            for name, value in (("weight", self.largest_weight), ("bias", self.largest_bias))
            if value > LARGEST
        ]
        if self.underflows:
            parts.append(f"folding puts {self.lost:.1%} of the weights below {SMALLEST_NORMAL:.1e}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "overflows": self.overflows,
            "underflows": self.underflows,
            "largest_weight": self.largest_weight if math.isfinite(self.largest_weight) else None,
            "largest_bias": self.largest_bias if math.isfinite(self.largest_bias) else None,
            "lost": self.lost,
            "warning": self.warning,
        }


def coefficients_of(norm: nn.Module) -> Coefficients | None:
    """The coefficients of a batch norm; None where its class is unknown, or its tensors hold no values."""
    operands = _batch_norm(norm)
    if operands is None:
        return None
    scale = scale_of(operands.weight, inverse_deviation(operands.running_var, operands.eps))
    return Coefficients(tuple(scale.tolist()))


def float16_range_of(conv: nn.Module, norm: nn.Module) -> Float16Range | None:
    """Folds a pair of modules in float64 and looks how the result lies in float16's range.

    The convolution is put in Eval mode: a parametrisation may change what it keeps when it is read in Train mode.

    Returns:
        The range; None where a class is unknown, the channels differ, or the tensors hold no values.
    """
    conv_operands, norm_operands = _convolution(conv), _batch_norm(norm)
    if conv_operands is None or norm_operands is None:
        return None
    if norm_operands.running_var.shape != (output_channels(conv_operands),):
        return None
    weight, bias = fold(conv_operands, norm_operands)
    before = conv_operands.weight.abs()
    after = weight.abs()
    lost = (before >= SMALLEST_NORMAL) & (after < SMALLEST_NORMAL) & (after > 0)  # 0 is exact
    nonzero = int(before.count_nonzero())
    return Float16Range(_largest(after), _largest(bias.abs()), int(lost.sum()) / nonzero if nonzero else 0.0)


def _largest(magnitudes: Tensor) -> float:
    return float(magnitudes.max()) if bool(magnitudes.isfinite().all()) else math.inf


def _batch_norm(norm: nn.Module) -> BatchNorm | None:
    kind = kinds.batch_norm_kind(norm)
    if kind is None or not kind.has_statistics(norm):
        return None
    operands: BatchNorm = kind.operands(norm)
    if not _has_values(operands.running_var):
        return None
    mean, var, gamma, beta = (_value(vector) for vector in operands[:4])
    return BatchNorm(mean, var, gamma, beta, operands.eps)


def _convolution(conv: Any) -> Convolution | None:
    kind = kinds.convolution_kind(conv)
    if kind is None or kind.plain is None:
        return None
    cls, weight = kind.plain(conv.eval())
    if not _has_values(weight):
        return None
    transposed = issubclass(cls, ConvTransposeBase)
    groups = getattr(conv, "groups", 1)
    return Convolution("", _value(weight), _value(conv.bias), transposed=transposed, groups=groups)


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _value(tensor: Any) -> Any:
    """The tensor in float64, where every device can compute; None stays None."""
    return None if tensor is None else tensor.detach().to("cpu", torch.float64)
