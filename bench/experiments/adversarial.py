"""Adversarial examples (the paper's table 10 and figure 4): memory and time of making them, and whether they are equal.

The attacks are foolbox's. They ask for the gradient of the images alone: nobody needs that of a parameter, and so
nobody needs a convolution's input. Memory is counted where parameters are frozen and where they are left trainable.
"""

import copy
import statistics
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness.better import Case
from bench.harness.contenders import COMPOSITE, DEPLOY, EVAL, TUNE, make
from bench.harness.markdown import error, megabytes, spread, table
from bench.harness.models import MODELS as OTHERS
from bench.harness.results import Options, Result
from bench.harness.steps import images, times
from bench.harness.timing import Ratio, ratio
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import randomize_batchnorms

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports scipy's old names
    import foolbox

CONTENDERS: Final = (EVAL, TUNE, COMPOSITE, DEPLOY)

#: Whose examples are compared in float64; Eval's second ones tell what comes of chance alone.
COMPARED: Final = (EVAL, TUNE)

#: The paper's architectures, and ResNet-50 beside them.
MODELS: Final[dict[str, Callable[[], nn.Module]]] = {
    **{
        name: partial(timm.create_model, name, pretrained=False)
        for name in ("resnest101e", "dla102", "selecsls42b", "res2next50", "ghostnet_100")
    },
    **{name: OTHERS[name] for name in ("unet", "resnet50")},
}
SMOKE: Final[dict[str, Callable[[], nn.Module]]] = {
    "test_resnet": partial(timm.create_model, "test_resnet", pretrained=False),
    "unet": OTHERS["unet"],
}

#: Do the parameters ask for gradients?
PARAMETERS: Final = {"frozen": False, "trainable": True}

#: How far a value may move, in images between 0 and 1; and how far a step of the iterative attacks goes.
EPSILON: Final = 8 / 255
STEP_SIZE: Final = 0.2 * EPSILON


@dataclass(frozen=True)
class Sizes:
    """Shapes of the batches that are counted and attacked, steps of the iterative attacks, seconds of a row."""

    counted: tuple[int, ...]
    attacked: tuple[int, ...]
    steps: int
    seconds: float


def _sizes(options: Options) -> Sizes:
    if options.smoke:
        return Sizes(counted=(2, 3, 32, 32), attacked=(2, 3, 32, 32), steps=2, seconds=options.turns)
    attacked = (8, 3, 224, 224) if options.device == "cuda" else (4, 3, 96, 96)
    return Sizes(counted=(8, 3, 224, 224), attacked=attacked, steps=10, seconds=options.turns)


def _attacks(steps: int) -> dict[str, Any]:
    return {
        "FGSM": foolbox.attacks.LinfFastGradientAttack(),
        "BIM": foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=STEP_SIZE, steps=steps),
        "PGD": foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps),
    }


def run(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Counts, compares and times.

    Args:
        options: The command line's.

    Returns:
        Settings, rows and notes.
    """
    sizes = _sizes(options)
    models = SMOKE if options.smoke else MODELS
    rows = [row for name, build in models.items() for row in _rows(name, build, sizes, options.device)]
    settings = {
        "contenders": CONTENDERS,
        "counted": sizes.counted,
        "attacked": sizes.attacked,
        "epsilon": EPSILON,
        "step_size": STEP_SIZE,
        "steps": sizes.steps,
        "seconds": sizes.seconds,
        "memory_format": "channels_last",
        "foolbox": foolbox.__version__,
    }
    return settings, rows, [*NOTES]


NOTES: Final = (
    (
        "Bytes are those that autograd saves for one gradient step, parameters and buffers apart, counted by storage. "
        "The step is the same in all attacks."
    ),
    (
        "PyTorch's convolution saves its input whichever gradient is wanted, Deploy's too; a fused pair saves it only "
        "for the gradient of its weight or gamma."
    ),
    (
        "Times are those of whole attacks with frozen parameters, foolbox's last look at the examples included. Ratios "
        "are medians over rounds in which the contenders take turns, quartiles in brackets."
    ),
    (
        "Pixels are counted colour by colour. An attack goes by the sign of the gradient, which jumps where the "
        "gradient crosses 0, and the gradient itself jumps where a ReLU or a maximum switches: near such places "
        "rounding errors move pixels by whole steps. PGD starts at the same random place in all."
    ),
    "Weights, batch norms, images and targets are random; bytes do not depend on them, and times hardly.",
    (
        "foolbox attacks classifiers. The U-Net, which has a target for every pixel, is shown to it as one of two "
        "classes, right and wrong, whose cross-entropy is the mean of the pixels' own."
    ),
    (
        f"{COMPOSITE} has no form for the U-Net's grouped transposed convolutions: the rivals scale the second "
        "dimension of the weight, which holds the output channels of one group only."
    ),
)


def _rows(
    architecture: str, build: Callable[[], nn.Module], sizes: Sizes, device: str
) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model = randomize_batchnorms(build().eval(), seed=0).to(device)
    batch = torch.rand(sizes.attacked, generator=torch.Generator().manual_seed(0)).to(device)
    targets = _targets(model, batch)

    contenders = make(model, [contender for contender in CONTENDERS if _can(contender, model)])
    of_pixels = targets.ndim > 1
    saved = {
        parameters: _of_all(
            {
                contender: _count(module.requires_grad_(trainable), sizes.counted, of_pixels)
                for contender, module in contenders.items()
            }
        )
        for parameters, trainable in PARAMETERS.items()
    }

    of_double = make(copy.deepcopy(model).double(), COMPARED)
    exact = {name: _victim(module, batch.double(), targets) for name, module in of_double.items()}
    victims = {name: _victim(module, batch, targets) for name, module in contenders.items()}
    gradient_errors = {"float64": _gradient_errors(exact), "float32": _gradient_errors(victims)}
    for attack_name, attack in _attacks(sizes.steps).items():
        reference = exact[EVAL].examples(attack)
        examples = {name: victim.examples(attack) for name, victim in exact.items()}
        found: dict[str, Tensor] = {}
        steps = {contender: _step(victim, attack, contender, found) for contender, victim in victims.items()}
        seconds = times(steps, sizes.seconds, device)
        yield {
            "model": architecture,
            "attack": attack_name,
            "bytes": saved,
            "changed": _difference(reference, batch.double())["fraction"],
            "gradient_errors": gradient_errors,
            "differences": {
                "float64": _differences(examples, reference),
                "float32": _differences(found, found[EVAL]),
            },
            "seconds": _of_all(seconds),
        }


def _can(contender: str, model: nn.Module) -> bool:
    grouped = (isinstance(module, nn.ConvTranspose2d) and module.groups > 1 for module in model.modules())
    return contender != COMPOSITE or not any(grouped)


def _of_all(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by contender; None for one that has none."""
    return {contender: values.get(contender) for contender in CONTENDERS}


# --- A model under attack ----------------------------------------------------------------------------------------


class PixelLosses(nn.Module):
    """A segmentation model as a classifier of two classes, right and wrong.

    The probability of the first is the geometric mean of those that the model gives to the targets. So its
    cross-entropy is the mean of the pixels' own, and so is its gradient.

    Args:
        model: The model, with an output of shape (N, classes, H, W).
        targets: The pixels' classes, of shape (N, H, W).
    """

    targets: Tensor

    def __init__(self, model: nn.Module, targets: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("targets", targets)

    def forward(self, images: Tensor) -> Tensor:
        """Computes the logarithms of both probabilities.

        Args:
            images: Of shape (N, C, H, W).

        Returns:
            Scores of shape (N, 2).
        """
        loss = F.cross_entropy(self.model(images), self.targets, reduction="none").mean(dim=(1, 2))
        return torch.stack([-loss, torch.log(-torch.expm1(-loss))], dim=1)


def _classifier(model: nn.Module, targets: Tensor) -> tuple[nn.Module, Tensor]:
    """The model in a form that foolbox can attack, and the class of each image."""
    if targets.ndim == 1:
        return model, targets
    return PixelLosses(model, targets).eval(), targets.new_zeros(len(targets))


def _targets(model: nn.Module, batch: Tensor) -> Tensor:
    """A random class for each image, or for each pixel where the model's output has such."""
    with torch.no_grad():
        scores: Tensor = model(batch)
    shape = (scores.shape[0], *scores.shape[2:])
    return torch.randint(scores.shape[1], shape, generator=torch.Generator().manual_seed(0)).to(batch.device)


def _count(model: nn.Module, shape: Sequence[int], of_pixels: bool) -> int:
    """Bytes that a gradient step saves, counted on tensors that hold no memory."""
    device = next(model.parameters()).device
    targets = torch.zeros((), dtype=torch.long, device=device)
    classifier, _ = _classifier(model, targets.expand(shape[0], *(shape[2:] if of_pixels else ())))
    return saved_bytes(classifier, images(shape, str(device), fake=True).requires_grad_(), fake=True)


@dataclass(frozen=True)
class _Victim:
    """A classifier as foolbox sees it, and the images that it is attacked with."""

    model: Any
    batch: Tensor
    classes: Tensor

    def examples(self, attack: Any) -> Tensor:
        """The adversarial examples."""
        torch.manual_seed(0)  # PGD starts at random
        _, examples, _ = attack(self.model, self.batch, self.classes, epsilons=EPSILON)
        found: Tensor = examples
        return found

    def gradient(self) -> Tensor:
        """What the first step of FGSM and BIM goes by."""
        batch = self.batch.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(self.model(batch), self.classes), batch)
        return gradient


def _victim(model: nn.Module, batch: Tensor, targets: Tensor) -> _Victim:
    model = model.to(memory_format=torch.channels_last).requires_grad_(False)
    classifier, classes = _classifier(model, targets)
    shown = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=batch.device)
    return _Victim(shown, batch.to(memory_format=torch.channels_last), classes)


def _step(victim: _Victim, attack: Any, contender: str, found: dict[str, Tensor]) -> Callable[[], None]:
    """A whole attack, to be timed, that leaves its examples behind."""

    def step() -> None:
        found[contender] = victim.examples(attack)

    return step


# --- The same examples? ------------------------------------------------------------------------------------------


def _gradient_errors(victims: Mapping[str, _Victim]) -> dict[str, float | None]:
    """Largest differences from Eval's gradient at the images, relative to its largest element."""
    expected = victims[EVAL].gradient()
    return _of_all(
        {
            contender: float((victim.gradient() - expected).abs().max() / expected.abs().max())
            for contender, victim in victims.items()
        }
    )


def _differences(examples: Mapping[str, Tensor], expected: Tensor) -> dict[str, dict[str, Any] | None]:
    return _of_all({contender: _difference(each, expected) for contender, each in examples.items()})


def _difference(examples: Tensor, expected: Tensor) -> dict[str, Any]:
    pixels = int((examples != expected).sum())
    return {
        "pixels": pixels,
        "fraction": pixels / expected.numel(),
        "largest": float((examples - expected).abs().max()),
    }


# --- Tables and picture ------------------------------------------------------------------------------------------


def tables(result: Result) -> Iterator[str]:
    """What attacks take; what they take of trainable parameters; all times; what rounding errors do.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    yield table(
        (
            "model",
            "attack",
            *(f"MB {contender}" for contender in CONTENDERS),
            "time Tune / Eval",
            "pixels that differ, float64",
        ),
        (
            (
                row["model"],
                row["attack"],
                *_megabytes(row, "frozen"),
                spread(_ratio(row, TUNE)),
                _pixels(row, "float64", TUNE),
            )
            for row in result.rows
        ),
    )
    yield table(
        ("MB, parameters trainable", *CONTENDERS, "Tune / Eval"),
        (
            (
                row["model"],
                *_megabytes(row, "trainable"),
                f"{row['bytes']['trainable'][TUNE] / row['bytes']['trainable'][EVAL]:.3f}",
            )
            for row in _models(result)
        ),
    )
    yield table(
        ("time", "attack", "Eval, ms", *(f"{contender} / Eval" for contender in CONTENDERS[1:])),
        (
            (
                row["model"],
                row["attack"],
                f"{1e3 * statistics.median(row['seconds'][EVAL]):.0f}",
                *(spread(_ratio(row, contender)) for contender in CONTENDERS[1:]),
            )
            for row in result.rows
        ),
    )
    yield table(
        ("pixels that differ, float32", "attack", *CONTENDERS[1:]),
        (
            (row["model"], row["attack"], *(_pixels(row, "float32", each) for each in CONTENDERS[1:]))
            for row in result.rows
        ),
    )
    yield table(
        ("gradient's error", f"{TUNE}, float64", *(f"{each}, float32" for each in CONTENDERS[1:])),
        (
            (
                row["model"],
                error(row["gradient_errors"]["float64"][TUNE]),
                *(error(row["gradient_errors"]["float32"][each]) for each in CONTENDERS[1:]),
            )
            for row in _models(result)
        ),
    )


def cases(result: Result) -> Iterator[Case]:
    """The comparisons in which another contender may be better, parameters frozen.

    Args:
        result: The benchmark's.

    Yields:
        One for each row.
    """
    for row in result.rows:
        yield Case(f"{row['model']}, {row['attack']}", row["bytes"]["frozen"], row["seconds"])


def _models(result: Result) -> Collection[Mapping[str, Any]]:
    """A row of each model, for what is the same in all attacks."""
    return {row["model"]: row for row in result.rows}.values()


def _megabytes(row: Mapping[str, Any], parameters: str) -> Iterator[str | None]:
    return (megabytes(row["bytes"][parameters][contender]) for contender in CONTENDERS)


def _ratio(row: Mapping[str, Any], contender: str) -> Ratio | None:
    seconds = row["seconds"]
    return None if seconds[contender] is None else ratio(seconds[contender], seconds[EVAL])


def _pixels(row: Mapping[str, Any], dtype: str, contender: str) -> str | None:
    """How many, which part of all, and by how much at most."""
    found = row["differences"][dtype][contender]
    if found is None:
        return None
    if not found["pixels"]:
        return "0"
    return f"{found['pixels']} ({100 * found['fraction']:.2g} %), by {found['largest']:.2g}"


def plot(result: Result) -> Figure:
    """Memory by model and contender.

    Args:
        result: The benchmark's.

    Returns:
        A figure of two panels, for frozen and trainable parameters.
    """
    rows = _models(result)
    figure = Figure(figsize=(9, 1.6 + 0.6 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    height = 0.8 / len(CONTENDERS)
    for panel, parameters in zip(panels, PARAMETERS, strict=True):
        for place, contender in enumerate(CONTENDERS):
            panel.barh(
                [index + (place - (len(CONTENDERS) - 1) / 2) * height for index in range(len(rows))],
                [(row["bytes"][parameters][contender] or 0) / 1e6 for row in rows],
                height,
                label=contender,
            )
        panel.set(xlabel="MB saved for a gradient step", title=f"parameters {parameters}", xlim=(0, None))
    panels[0].set_yticks(range(len(rows)), [row["model"] for row in rows])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(CONTENDERS))
    return figure
