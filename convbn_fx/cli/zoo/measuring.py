"""One model measured: its pairs, the bytes it saves, its errors. The result is its row."""

import copy
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor, nn

import convbn_fx
from convbn_fx._torch import pytree
from convbn_fx.api import tuned_and_deployed
from convbn_fx.cli.zoo.architectures import Subject, UnknownModel, load, of_library
from convbn_fx.cli.zoo.results import ERRORS, Level, Row, Status, in_one_line
from convbn_fx.functional.cost_rule import COSTS, Costs
from convbn_fx.kinds.modes import batch_norms
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import compare, randomize_batchnorms

#: Largest relative error of an output or a gradient in float64 that counts as equal.
TOLERANCE: Final = 1e-8

#: Two images: PyTorch's batch norm computes wrong gradients for one where grad_output is strided like channels_last.
BATCH: Final = 2

#: Image sizes that are tried for numbers, smallest first.
SIDES: Final = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)

#: Images are this times a standard normal draw: under larger ones the attention of networks with random weights
#: saturates, and the model's own rounding errors hide what is to be seen.
IMAGE_SCALE: Final = 0.1


@dataclass(frozen=True)
class Settings:
    """How models are measured.

    Attributes:
        level: How much of each.
        seed: Of weights, batch norms and images.
        max_parameters: Models with more parameters are measured in structure only.
        batch: How many images the bytes are counted for.
        side: Height and width of these; each model's own by default.
    """

    level: Level = Level.STRUCTURE
    seed: int = 0
    max_parameters: float = math.inf
    batch: int = BATCH
    side: int | None = None


@dataclass(frozen=True)
class Numbers:
    """Errors of a tuned model; each is relative to the largest magnitude of its tensor or module.

    Attributes:
        output_error: Worst of the outputs against the model's own, in float64.
        gradient_error: The same of the gradients by the input and every parameter.
        worst: Which gradient that is.
        float32_error_tune: Worst of the outputs in float32 against float64.
        float32_error_eval: The same of the untuned model's.
    """

    output_error: float
    gradient_error: float
    worst: str
    float32_error_tune: float
    float32_error_eval: float

    @property
    def failure(self) -> str:
        """What is wrong in one line; empty if nothing is."""
        if not self.output_error <= TOLERANCE:
            return f"an output differs by {self.output_error:.2e} in float64; at most {TOLERANCE:g}"
        if not self.gradient_error <= TOLERANCE:
            return f"{self.worst} differs by {self.gradient_error:.2e} in float64; at most {TOLERANCE:g}"
        return ""

    def __str__(self) -> str:
        """What `convbn-fx report --check` prints."""
        return self.failure or (
            f"Checked in float64: outputs differ by {self.output_error:.1e} at most, "
            f"gradients by {self.gradient_error:.1e} ({self.worst})."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain types; what is not finite is None."""
        errors = {name: value if math.isfinite(value) else None for name, value in self.errors.items()}
        return {"passed": not self.failure, "failure": self.failure, **errors}

    @property
    def errors(self) -> dict[str, Any]:
        """The cells of the row's columns of errors."""
        return {name: getattr(self, name) for name in ERRORS}


def measure(name: str, settings: Settings) -> Row:
    """The row of a model, whatever happens to it; `seconds` is left to whoever runs this."""
    torch.set_num_threads(1)  # the same sums in the same order, however many models are measured side by side
    row = Row(name=name, status=Status.PASS, level=Level.STRUCTURE)
    try:
        subject = _without_weights(name, settings.seed)
    except Exception as error:  # noqa: BLE001 - whatever a constructor raises is a result
        return replace(row, status=Status.UNBUILDABLE, level=settings.level, detail=in_one_line(error))
    model = subject.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    norms = len(list(batch_norms(model, [""])))
    numeric = settings.level is Level.NUMERIC and parameters <= settings.max_parameters
    level = Level.NUMERIC if numeric else Level.STRUCTURE
    row = replace(row, family=subject.family, parameters=parameters, batch_norms=norms, level=level)
    try:
        row = _with_structure(row, subject, settings)
        if numeric and row.fused and row.status is Status.PASS:
            numbers = compare_numbers(*for_smallest_images(subject, settings.seed), settings.seed)
            status = Status.FAIL if numbers.failure else Status.PASS
            row = replace(row, status=status, detail=numbers.failure, **numbers.errors)
    except Exception as error:  # noqa: BLE001 - whatever a model or we raise is a result
        row = replace(row, status=Status.ERROR, detail=in_one_line(error))
    return row


def _without_weights(name: str, seed: int) -> Subject:
    """The model on the meta device, even where its constructor needs values; your own models as they come."""
    if not of_library(name):
        return _with_weights(name, seed)
    try:
        with torch.device("meta"):
            return load(name)
    except UnknownModel:
        raise
    except Exception:  # noqa: BLE001 - constructors need values in every way there is
        subject = _with_weights(name, seed)
        subject.model.to("meta")  # the cost rule goes by the device
        return subject


def _with_weights(name: str, seed: int, built_for: int | None = None) -> Subject:
    torch.manual_seed(seed)
    return load(name, built_for=built_for)


def _with_structure(row: Row, subject: Subject, settings: Settings) -> Row:
    """The row with the numbers of pairs, of refusals, and of bytes."""
    model = subject.model
    device = _device(model)
    with device:
        inputs = subject.inputs(settings.batch, settings.side)
    if not row.batch_norms and not _normalises(model, subject.body, inputs):
        return replace(row, fused=0, refused={})
    tuned, deployed = tuned_and_deployed(model)
    report = convbn_fx.report(tuned)
    refused = {reason.name: count for reason, count in report.reasons.items()}
    in_eval_mode, in_tune_mode, in_deploy_mode = (
        saved_bytes(each.get_submodule(subject.body), *inputs, fake=device.type != "meta")
        for each in (model, tuned, deployed)
    )
    row = replace(row, fused=len(report.fused), refused=refused, input=subject.describe(inputs))
    row = replace(row, bytes_eval=in_eval_mode, bytes_tune=in_tune_mode, bytes_deploy=in_deploy_mode)
    if in_tune_mode > in_eval_mode:
        return replace(row, status=Status.FAIL, detail="tuned, it saves more bytes than before")
    return row


def _normalises(model: nn.Module, body: str, inputs: tuple[Any, ...]) -> bool:
    """Whether a forward without batch norm modules calls the function itself; to look for pairs takes longer."""
    try:  # F.batch_norm ends in this function, too
        with torch.no_grad(), mock.patch.object(torch, "batch_norm", wraps=torch.batch_norm) as function:
            model.get_submodule(body)(*inputs)
    except Exception:  # noqa: BLE001 - it may yet be looked through
        return True
    return bool(function.called)


def _device(model: nn.Module) -> torch.device:
    """Where a model's inputs belong."""
    return torch.device("meta" if any(parameter.is_meta for parameter in model.parameters()) else "cpu")


def for_smallest_images(subject: Subject, seed: int) -> tuple[Subject, int | None]:
    """A model built anew, with weights, for the smallest images that it takes, or else that it can be built for.

    Trying costs nothing on the meta device. Returns the images' height and width, too; None for the model's own.
    """
    if subject.resizable:
        largest = max(subject.shape[-2:])
        for rebuilt, side in itertools.product((False, True), SIDES):
            if side < largest and _takes(subject, side, rebuilt):
                return _with_weights(subject.name, seed, side if rebuilt else None), side
    return _with_weights(subject.name, seed), None


def _takes(subject: Subject, side: int, rebuilt: bool) -> bool:
    try:
        with _device(subject.model):
            if rebuilt:
                subject = load(subject.name, built_for=side)
            inputs = subject.inputs(BATCH, side)
        with torch.no_grad():
            subject.model.get_submodule(subject.body)(*inputs)
    except Exception:  # noqa: BLE001 - too small: models say so in every way there is
        return False
    return True


def compare_numbers(subject: Subject, side: int | None, seed: int) -> Numbers:
    """Compares a model, its batch norms made random, with itself tuned: in float64, and in float32.

    Args:
        subject: The model, with weights.
        side: Height and width of its images; its own by default.
        seed: Of the batch norms and the images.

    Returns:
        The errors.

    Raises:
        AssertionError: The two differ in more than numbers.
    """
    images = drawn(subject.inputs(BATCH, side), seed)
    model = randomize_batchnorms(subject.model, seed).get_submodule(subject.body)
    _calibrate(model, images)
    # All copies are made before the first call, in which some models cache tensors that have a history.
    tuned = convbn_fx.tune(model)
    double, tuned_double = copy.deepcopy((model, tuned))
    double.double(), tuned_double.double()
    doubles = pytree.tree_map_only(
        Tensor, lambda each: each.double() if each.is_floating_point() else each, images
    )
    # In images this small, many pairs would run as in Eval mode for the sake of time.
    with mock.patch.dict(COSTS, cpu=Costs(fixed=0, weight_per_output=math.inf)):
        comparison = compare(double, tuned_double, *doubles, per_module=True)
    if any(comparison.state.values()):
        changed = max(comparison.state, key=lambda name: comparison.state[name])
        raise AssertionError(f"{changed} differs")
    with torch.no_grad():
        reference = _tensors(double(*doubles))
        in_tune_mode, in_eval_mode = (
            _worst_error(_tensors(each(*images)), reference) for each in (tuned, model)
        )
    worst = max(comparison.gradients, key=lambda name: comparison.gradients[name], default="")
    return Numbers(
        output_error=max(comparison.outputs.values(), default=0.0),
        gradient_error=comparison.gradients.get(worst, 0.0),
        worst=worst,
        float32_error_tune=in_tune_mode,
        float32_error_eval=in_eval_mode,
    )


def _calibrate(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Gives batch norms the means of what they see, and where the mean squares are larger than their variances, these.

    With random statistics alone, activations grow from layer to layer, and rounding errors with them: of a deep
    network's output in float32, nothing is right in Eval mode itself. So no batch norm amplifies what it sees.
    """

    def adopt(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = next(iter((*args, *kwargs.values())))
        across = [axis for axis in range(seen.dim()) if axis != 1]
        if norm.running_mean is not None and seen.numel():
            norm.running_mean.copy_(seen.mean(across))
            norm.running_var.copy_(norm.running_var.maximum(seen.square().mean(across)))

    trial = copy.deepcopy(model)  # some models cache what they compute in a call
    norms = list(batch_norms(trial, [""]))
    for norm in norms:
        norm.register_forward_pre_hook(adopt, with_kwargs=True)
    with torch.no_grad():
        trial(*inputs)
    for norm, calibrated in zip(batch_norms(model, [""]), norms, strict=True):
        norm.load_state_dict(calibrated.state_dict())


def drawn(inputs: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Random images in the place of inputs that hold no memory; a user's own examples stay as they are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.stride() != (0,) * tensor.dim():
            return tensor
        return IMAGE_SCALE * torch.randn(tensor.shape, generator=generator)

    images: tuple[Any, ...] = pytree.tree_map_only(Tensor, draw, inputs)
    return images


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _worst_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    errors = [
        ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()
        for ours, theirs in zip(found, expected, strict=True)
        if theirs.is_floating_point() and not torch.equal(ours.double(), theirs)
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)
