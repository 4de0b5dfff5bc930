"""Memory and time of detectors that are fine-tuned with frozen statistics (the paper's tables 4, 8 and 9).

The batch norms are in Eval mode and train their affine parameters, the detector itself is in Train mode and returns
losses (what detectors call `norm_eval`). The stem and the first stage of every backbone are frozen, as is usual.

Memory is that of a training forward of two images of 800x1333, images and targets in, losses out. What a detector does
depends on what it finds, so that it does not run on tensors that hold no memory. Its backbone does, where all batch
norms are; what comes behind it is the same for all contenders and backbones, and is counted on real tensors, once.
"""

import copy
import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import convbn_fx
from bench.harness.better import Case
from bench.harness.contenders import COMPOSITE, DEPLOY, EVAL, FROZEN, TUNE, composite, make
from bench.harness.detectors import BACKBONES, BOXES, CLASSES, DIVISOR, batch, build
from bench.harness.markdown import error, megabytes, spread, table
from bench.harness.results import Options, Result
from bench.harness.steps import peak, times
from bench.harness.timing import ratio
from convbn_fx.memory import saved_bytes
from convbn_fx.tuning.cloning import clone

#: Detectors and their backbones.
MODELS: Final = (
    ("Faster R-CNN", "ResNet-50"),
    ("Faster R-CNN", "ResNet-101"),
    ("Faster R-CNN", "ResNeXt-101"),
    ("Faster R-CNN", "RegNet"),
    ("Faster R-CNN", "HRNet"),
    ("Faster R-CNN", "RepVGG"),
    ("Mask R-CNN", "ResNet-50"),
    ("Mask R-CNN", "ResNet-101"),
    ("RetinaNet", "ResNet-50"),
    ("RetinaNet", "ResNet-101"),
)
SMOKE: Final = (
    ("Faster R-CNN", "ResNet-18"),
    ("Mask R-CNN", "small RepVGG"),
    ("RetinaNet", "small RegNet"),
    ("RetinaNet", "small HRNet"),
)

CONTENDERS: Final = (EVAL, TUNE, COMPOSITE, DEPLOY, FROZEN)

#: What half precision is, by device; by autocast.
HALF: Final = {"cpu": torch.bfloat16, "cuda": torch.float16}

#: Counted as a whole on real tensors, too, by these contenders: a check of the sum of the parts.
CHECKED: Final = (EVAL, TUNE)
#: On a CPU that takes long and is done in float32 for these backbones alone.
CHECKED_ON_CPU: Final = ("ResNet-50", "ResNet-101", "ResNet-18")
#: Half precision, which many a CPU only emulates, is counted as a whole and timed there for these alone.
HALF_ON_CPU: Final = (("Faster R-CNN", "ResNet-50"), ("Faster R-CNN", "ResNet-18"))

TOTAL: Final = "total"


@dataclass(frozen=True)
class Sizes:
    """Shapes of the batches: what memory is counted at, what is timed, and what losses are compared on."""

    counted: tuple[int, int, int, int]
    timed: tuple[int, int, int, int]
    compared: tuple[int, int, int, int]


FULL: Final = {
    "cpu": Sizes(counted=(2, 3, 800, 1333), timed=(1, 3, 320, 320), compared=(2, 3, 128, 160)),
    "cuda": Sizes(counted=(2, 3, 800, 1333), timed=(2, 3, 800, 1333), compared=(2, 3, 128, 160)),
}
TOY: Final = Sizes(counted=(2, 3, 64, 90), timed=(1, 3, 64, 64), compared=(1, 3, 64, 64))


def run(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Counts, compares losses, and times.

    Args:
        options: The command line's.

    Returns:
        Settings, rows and notes.
    """
    sizes = TOY if options.smoke else FULL[options.device]
    rows = list(_rows(options, sizes))
    settings = {
        "contenders": CONTENDERS,
        "sizes": asdict(sizes),
        "seconds": options.seconds,
        "classes": CLASSES,
        "boxes_per_image": BOXES,
        "memory_format": "contiguous",
        "frozen": "stem and first stage of every backbone",
    }
    return settings, rows, _notes(options, sizes)


def _notes(options: Options, sizes: Sizes) -> list[str]:
    notes = [
        _PARTS.format(_by(sizes.counted)),
        _WHOLE,
        _LOSSES.format(_by(sizes.compared)),
        "The composite replaces the body of the backbone by a rewritten graph; the detector around it stays.",
        _HALF,
        _TIMES.format(_by(sizes.timed)),
    ]
    if options.device == "cpu":
        notes.append(_ON_CPU)
    return notes


_PARTS: Final = (
    "The batch norms are BatchNorm2d in Eval mode, the detector is in Train mode; the stem and the first stage of "
    "every backbone are frozen; weights are random. Bytes are those that autograd saves in a training forward at {}, "
    "parameters and buffers apart, counted by storage: backbone and pyramid on tensors that hold no memory, for each "
    "contender; heads and losses on real tensors and random features, once for each detector, for they are the same "
    "for all. How much the heads save depends on how many boxes they find, which on random features are few."
)
_WHOLE: Final = (
    '"As a whole": the detector with its own features, counted on real tensors in one call; it differs from the sum of '
    "the parts by what is saved for boxes that are found in the one and not in the other."
)
_LOSSES: Final = (
    "Loss difference: Tune against Eval in float64, the largest relative difference of any loss and of their sum at "
    "{}. In half precision: Tune against Eval in float64, and in brackets the same of Eval in half precision; rounding "
    "decides there which boxes are drawn."
)
_HALF: Final = (
    "In half precision (autocast) FrozenBatchNorm2d multiplies by float32 tensors and returns float32, so that what "
    "follows it is saved in float32, too; Tune keeps the scale on the output."
)
_TIMES: Final = (
    "Times are of forward and backward at {}; ratios are medians over rounds in which the contenders take turns, "
    "quartiles in brackets."
)


_ON_CPU: Final = (
    "On a CPU not all is done, for it takes long: as a whole, float32 is counted for the ResNets alone; half precision "
    "is timed and counted as a whole for Faster R-CNN with ResNet-50 alone, because many a CPU emulates it."
)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _rows(options: Options, sizes: Sizes) -> Iterator[dict[str, Any]]:
    device, half = options.device, HALF[options.device]
    heads: dict[tuple[str, torch.dtype], int] = {}
    for detector, backbone in SMOKE if options.smoke else MODELS:
        model = build(detector, backbone, toy=options.smoke).to(device)
        contenders = make_detectors(model)
        differences = _differences(model, contenders, sizes.compared, device)
        report = convbn_fx.report(contenders[TUNE])
        for precision in (torch.float32, half):
            if (detector, precision) not in heads:
                heads[detector, precision] = count_heads(model, sizes.counted, precision, device)
            fits = device == "cuda" or precision is torch.float32 or (detector, backbone) in HALF_ON_CPU
            checked = fits and (device == "cuda" or backbone in CHECKED_ON_CPU)
            yield {
                "detector": detector,
                "backbone": backbone,
                "architecture": BACKBONES[backbone][1],
                "precision": str(precision).removeprefix("torch."),
                "fused": len(report.fused),
                "left": {reason.name: count for reason, count in report.reasons.most_common()},
                "backbone_bytes": {
                    name: count_backbone(contender, sizes.counted, precision, device)
                    for name, contender in contenders.items()
                },
                "head_bytes": heads[detector, precision],
                "whole_bytes": {
                    name: count_whole(contenders[name], sizes.counted, precision, device)
                    for name in (CHECKED if checked else ())
                },
                "loss_differences": differences[precision],
                **_timed(contenders if fits else {}, sizes.timed, precision, options),
            }


# --- Contenders --------------------------------------------------------------------------------------------------


def make_detectors(model: Any) -> dict[str, nn.Module]:
    """Makes the contenders of a detector.

    Args:
        model: The detector in Eval mode; it becomes the first contender.

    Returns:
        By name detectors that return losses, the batch norms of all of them in Eval mode.
    """
    contenders: dict[str, Any] = make(model, (EVAL, DEPLOY, FROZEN))
    contenders[TUNE] = convbn_fx.tune(model, norm_eval=True)
    contenders[COMPOSITE] = clone(model)
    contenders[COMPOSITE].backbone.body = composite(model.backbone.body)
    parameter = next(model.parameters())
    for contender in contenders.values():
        contender.to(parameter.device, parameter.dtype).train()
        convbn_fx.batchnorm_mode(contender, train=False)
    return {name: contenders[name] for name in CONTENDERS}


def _autocast(device: str, precision: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device, precision) if precision in HALF.values() else nullcontext()


# --- Memory ------------------------------------------------------------------------------------------------------


class _Used(nn.Module):
    """A detector's backbone, and a use of every level that saves it: as the heads behind it have one."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, images: Tensor) -> list[Tensor]:
        return [level * level for level in self.detector.backbone(images).values()]


class _Given(nn.Module):
    """Stands in the place of a backbone: levels of a pyramid that are there already.

    They are buffers, so that they do not count: they are counted with the backbone that makes them.
    """

    def __init__(self, levels: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(levels)
        for name, level in levels.items():
            self.register_buffer(name, level, persistent=False)

    def forward(self, _: Tensor) -> Mapping[str, Tensor]:
        return OrderedDict((name, self.get_buffer(name)) for name in self.names)


def _padded(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what the backbone is given."""
    count, channels, *sides = shape
    return count, channels, *(-(-side // DIVISOR) * DIVISOR for side in sides)


def count_backbone(detector: nn.Module, shape: Sequence[int], precision: torch.dtype, device: str) -> int:
    """Bytes that the backbone and its pyramid save, their output included, on tensors that hold no memory.

    Args:
        detector: In Train mode.
        shape: Of the batch.
        precision: float32, or what autocast casts to.
        device: The detector's.

    Returns:
        The number of bytes.
    """
    images = torch.empty((), device=device).expand(_padded(shape))
    with _autocast(device, precision):
        return saved_bytes(_Used(detector), images, fake=True)


def count_heads(detector: Any, shape: Sequence[int], precision: torch.dtype, device: str) -> int:
    """Bytes that all behind the backbone saves, on random features; the features themselves are not counted.

    Args:
        detector: In Train mode.
        shape: Of the batch.
        precision: float32, or what autocast casts to.
        device: The detector's.

    Returns:
        The number of bytes.
    """
    meta = copy.deepcopy(detector.backbone).to("meta")
    shapes = {name: level.shape for name, level in meta(torch.empty(_padded(shape), device="meta")).items()}
    generator = torch.Generator().manual_seed(0)
    levels = {
        name: torch.randn(shape, generator=generator).to(device, precision).requires_grad_()
        for name, shape in shapes.items()
    }
    heads = clone(detector)
    heads.backbone = _Given(levels)
    return count_whole(heads, shape, precision, device)


def count_whole(detector: nn.Module, shape: Sequence[int], precision: torch.dtype, device: str) -> int:
    """Bytes that a training forward saves, on real tensors.

    Args:
        detector: In Train mode.
        shape: Of the batch.
        precision: float32, or what autocast casts to.
        device: The detector's.

    Returns:
        The number of bytes.
    """
    images, targets = batch(shape, device=device)
    torch.manual_seed(0)  # which boxes are drawn depends on it
    with _autocast(device, precision):
        return saved_bytes(detector, images, targets)


# --- Losses and time ---------------------------------------------------------------------------------------------


def losses(
    detector: nn.Module, shape: Sequence[int], precision: torch.dtype, device: str
) -> dict[str, float]:
    """The losses of a training forward, which records its graph as in training, and their sum.

    Args:
        detector: In Train mode.
        shape: Of the batch.
        precision: Of the detector, or what autocast casts to.
        device: The detector's.

    Returns:
        The losses by name.
    """
    dtype = next(detector.parameters()).dtype
    torch.manual_seed(0)
    with _autocast(device, precision):
        found = {name: loss.item() for name, loss in detector(*batch(shape, dtype, device)).items()}
    return {**found, TOTAL: sum(found.values())}


def _differences(
    model: nn.Module, contenders: Mapping[str, nn.Module], shape: Sequence[int], device: str
) -> dict[torch.dtype, dict[str, dict[str, float | None]]]:
    """By the rows' precision, contender and loss: the difference from Eval in float64, relative to it.

    In the row of float32 the contenders run in float64, where nothing but the formula can differ.
    """
    doubles = make_detectors(copy.deepcopy(model).eval().double())
    reference = losses(doubles[EVAL], shape, torch.float64, device)

    def difference(found: float, expected: float) -> float | None:
        return abs(found - expected) / abs(expected) if math.isfinite(found) and expected else None

    differences: dict[torch.dtype, dict[str, dict[str, float | None]]] = {}
    half = HALF[device]
    for row, precision, group in ((torch.float32, torch.float64, doubles), (half, half, contenders)):
        differences[row] = {}
        for name, contender in group.items():
            found = losses(contender, shape, precision, device)
            differences[row][name] = {loss: difference(found[loss], reference[loss]) for loss in reference}
    return differences


def _timed(
    contenders: Mapping[str, nn.Module], shape: Sequence[int], precision: torch.dtype, options: Options
) -> dict[str, Any]:
    """Seconds of each round, and on CUDA the peak; None where there is nothing to time."""
    images, targets = batch(shape, device=options.device)
    steps = {
        name: _step(contender, images, targets, precision, options.device)
        for name, contender in contenders.items()
    }
    if not steps:
        return {"seconds": None, "peak": None}
    seconds = times(steps, options.turns, options.device)
    peaks = (
        {name: peak(step, options.device) for name, step in steps.items()}
        if options.device == "cuda"
        else None
    )
    return {"seconds": seconds, "peak": peaks}


def _step(
    detector: nn.Module,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    precision: torch.dtype,
    device: str,
) -> Callable[[], None]:
    def step() -> None:
        for parameter in detector.parameters():
            parameter.grad = None
        torch.manual_seed(0)  # the same boxes are drawn in every step
        with _autocast(device, precision):
            loss: Tensor = sum(detector(images, targets).values())
        loss.backward()

    return step


# --- Tables and picture ------------------------------------------------------------------------------------------

_WHICH: Final = ("detector", "backbone", "precision")


def tables(result: Result) -> Iterator[str]:
    """The paper's table; then how its memory was counted, and times.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    yield table(
        (
            *_WHICH,
            *("MB Eval", "MB Tune", "saved %"),
            *("MB composite", "MB Deploy", "MB FrozenBatchNorm", "loss difference", "time Tune / Eval"),
        ),
        (
            (
                *_which(row),
                *(megabytes(_bytes(row, contender)) for contender in (EVAL, TUNE)),
                _saved(_bytes(row, EVAL), _bytes(row, TUNE)),
                *(megabytes(_bytes(row, contender)) for contender in (COMPOSITE, DEPLOY, FROZEN)),
                _loss_difference(row),
                _time(row, TUNE, EVAL),
            )
            for row in result.rows
        ),
    )
    yield table(
        (
            *(*_WHICH, "pairs fused", "batch norms left"),
            *("MB backbone Eval", "MB backbone Tune", "saved %", "MB heads"),
            *("MB Eval, as a whole", "MB Tune, as a whole"),
        ),
        (
            (
                *(*_which(row), row["fused"], _left(row)),
                *(megabytes(row["backbone_bytes"][contender]) for contender in CHECKED),
                _saved(*(row["backbone_bytes"][contender] for contender in CHECKED)),
                megabytes(row["head_bytes"]),
                *(megabytes(row["whole_bytes"].get(contender)) for contender in CHECKED),
            )
            for row in result.rows
        ),
    )
    pairs = ((TUNE, EVAL), (COMPOSITE, EVAL), (DEPLOY, EVAL), (FROZEN, EVAL), (TUNE, DEPLOY))
    yield table(
        (*_WHICH, "Eval, ms", *(f"{one} / {other}" for one, other in pairs)),
        (
            (
                *_which(row),
                f"{1e3 * statistics.median(row['seconds'][EVAL]):.0f}",
                *(_time(row, one, other) for one, other in pairs),
            )
            for row in result.rows
            if row["seconds"]
        ),
    )
    if any(row["peak"] for row in result.rows):
        yield table(
            (*_WHICH, *(f"peak MB {contender}" for contender in CONTENDERS), "saved %"),
            (
                (
                    *_which(row),
                    *(megabytes(row["peak"][contender]) for contender in CONTENDERS),
                    _saved(row["peak"][EVAL], row["peak"][TUNE]),
                )
                for row in result.rows
                if row["peak"]
            ),
        )


def cases(result: Result) -> Iterator[Case]:
    """The comparisons in which another contender may be better.

    Args:
        result: The benchmark's.

    Yields:
        One for each row.
    """
    for row in result.rows:
        counts = {contender: _bytes(row, contender) for contender in CONTENDERS}
        yield Case(", ".join(_which(row)), counts, row["seconds"] or {})


def _which(row: Mapping[str, Any]) -> Iterator[str]:
    return (row[name] for name in _WHICH)


def _bytes(row: Mapping[str, Any], contender: str) -> int:
    count: int = row["backbone_bytes"][contender] + row["head_bytes"]
    return count


def _saved(before: int, after: int) -> str:
    return f"{100 * (1 - after / before):.0f}"


def _left(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in row["left"].items()) or "0"


def _loss_difference(row: Mapping[str, Any]) -> str | None:
    """The worst of Tune's, and Eval's own behind it where it has one."""
    tune, own = (list(row["loss_differences"][contender].values()) for contender in (TUNE, EVAL))
    if None in tune + own:
        return None
    return error(max(tune)) if row["precision"] == "float32" else f"{error(max(tune))} ({error(max(own))})"


def _time(row: Mapping[str, Any], one: str, other: str) -> str | None:
    return spread(ratio(row["seconds"][one], row["seconds"][other])) if row["seconds"] else None


def plot(result: Result) -> Figure:
    """Memory in Eval and in Tune mode, a panel a precision.

    Args:
        result: The benchmark's.

    Returns:
        A figure of two panels.
    """
    precisions = list(dict.fromkeys(row["precision"] for row in result.rows))
    labels = list(dict.fromkeys(f"{row['detector']}, {row['backbone']}" for row in result.rows))
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    for panel, precision in zip(panels, precisions, strict=True):
        rows = [row for row in result.rows if row["precision"] == precision]
        for offset, contender in ((-0.2, EVAL), (0.2, TUNE)):
            panel.barh(
                [position + offset for position in range(len(rows))],
                [_bytes(row, contender) / 1e9 for row in rows],
                height=0.38,
                label=contender,
            )
        panel.set(title=precision, xlabel="GB saved for the backward pass", xlim=(0, None))
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    panels[0].legend()
    return figure
