"""What the shapes of a pair predict, against what is measured (the paper's appendix M).

Each fused pair is looked at by itself: the bytes that it saves for the backward pass in each mode, and the memory
traffic that Tune mode does away with, which should show as time. Then the whole model: what several pairs save is
there once, and other layers save, too.

Traffic is counted as if each operation read each of its operands once and wrote its result once. With Y the size of a
convolution's output and W that of its weight,

    Eval's batch norm           reads Y, writes Z; backward reads Y and dZ, writes dY                           5 Y
    Tune, scale on the weight   reads W, writes W'; backward the same again, reads dW' and W for gamma's
                                gradient, reads and writes dW'; sums dZ for beta's                        8 W + 1 Y
    Tune, scale on the output   reads Y, writes Z; backward reads and writes dZ, sums it, reads dW' and W 2 W + 5 Y

and 1 Y more in Eval mode where the convolution has a bias, whose gradient is a sum over dY.
"""

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import convbn_fx
from bench.harness.contenders import DEPLOY, EVAL, TUNE, make
from bench.harness.keeping import keeping
from bench.harness.markdown import NOTHING, megabytes, table
from bench.harness.models import MODELS
from bench.harness.results import Options, Result
from bench.harness.steps import count, images, times
from convbn_fx.functional import conv_batch_norm
from convbn_fx.functional.cost_rule import Form, cheapest_form
from convbn_fx.records import Pair
from convbn_fx.testing import randomize_batchnorms

MODES: Final = (EVAL, TUNE, DEPLOY)

#: Models, and the shape of their images.
FULL: Final = (("resnet50", "mobilenet_v2", "unet"), (8, 3, 224, 224))
SMOKE: Final = (("resnet18", "unet"), (1, 3, 32, 32))

#: Of the seconds that the command line gives a row, the part that a pair takes: there are more than a hundred.
PART_OF_SECONDS: Final = 0.1


class Sizes(NamedTuple):
    """Of one pair, in bytes; what the predictions are made of."""

    input: int
    weight: int
    output: int


def run(options: Options) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Predicts, counts and times.

    Args:
        options: The command line's.

    Returns:
        Settings, rows and notes. A model's rows are its pairs, then the model itself.
    """
    names, shape = SMOKE if options.smoke else FULL
    seconds = PART_OF_SECONDS * options.turns
    rows = [row for name in names for row in _rows(name, shape, seconds, options.device)]
    settings = {"shape": shape, "seconds_per_pair": seconds, "memory_format": "channels_last"}
    return settings, rows, list(_notes(rows))


def _rows(name: str, shape: Sequence[int], seconds: float, device: str) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model = randomize_batchnorms(MODELS[name]().eval(), seed=0)
    # Of the pairs; what activations save besides is a line of its own.
    variants = make(model, MODES) | {TUNE: convbn_fx.tune(model, activations=False)}
    pairs = convbn_fx.report(variants[TUNE]).fused
    calls = _calls(model, shape, pairs)
    pairs = sorted(pairs, key=list(calls).index)
    kept = {mode: keeping(variants[mode], shape, pairs) for mode in MODES}

    of_pairs = []
    for place, pair in enumerate(pairs):
        conv, norm = model.get_submodule(pair.convolution), model.get_submodule(pair.batch_norm)
        row = _row_of_pair(name, pair.convolution, conv, calls[pair], device)
        row["measured"] = {mode: kept[mode].alone[place] for mode in MODES}
        row["shared"] = {mode: kept[mode].shared[place] for mode in MODES}
        row["seconds"] = times(_steps(conv, norm, calls[pair], device), seconds, device)
        of_pairs.append(row)
    yield from of_pairs
    yield _row(
        model=name,
        predicted=_sums(row["predicted"] for row in of_pairs),
        measured={mode: count(variants[mode], shape) for mode in MODES},
        shared=_sums(row["shared"] for row in of_pairs),
        others={mode: kept[mode].others for mode in MODES},
        with_activations=count(convbn_fx.tune(model), shape),
    )


class Call(NamedTuple):
    """What a convolution is called with, and what comes out.

    Attributes:
        shape: Of its input.
        requires_grad: Whether that wants a gradient.
        output: The output's shape.
    """

    shape: torch.Size
    requires_grad: bool
    output: torch.Size


def _calls(model: nn.Module, shape: Sequence[int], pairs: Iterable[Pair]) -> dict[Pair, Call]:
    """The call of each pair's convolution, in their order; each of these models' pairs runs once."""
    model, calls = copy.deepcopy(model).to("meta"), dict[Pair, Call]()
    for pair in pairs:

        def noted(_: nn.Module, args: tuple[Tensor], output: Tensor, pair: Pair = pair) -> None:
            calls[pair] = Call(args[0].shape, args[0].requires_grad, output.shape)

        model.get_submodule(pair.convolution).register_forward_hook(noted)
    model(torch.empty(tuple(shape), device="meta"))
    return calls


def _row(**values: Any) -> dict[str, Any]:
    """A row, with None for what is not given.

    `pair` is the convolution's name, None for the whole model; `predicted`, `measured` and `shared` are bytes by mode:
    shared is what an earlier pair saves already. `others` is what no pair saves, `with_activations` what Tune
    mode saves of the whole model where activations save less, too; `traffic` the bytes that Tune mode
    need not move; `seconds` those of a forward and backward pass of the pair alone, by mode.
    """
    keys = (
        "model",
        "pair",
        "form",
        "shapes",
        "predicted",
        "measured",
        "shared",
        "others",
        "with_activations",
        "traffic",
        "seconds",
    )
    return dict.fromkeys(keys) | values


def _sums(by_mode: Iterable[Mapping[str, int]]) -> dict[str, int]:
    parts = list(by_mode)
    return {mode: sum(part[mode] for part in parts) for mode in MODES}


# --- Predicted from shapes ----------------------------------------------------------------------------------------


def _row_of_pair(model: str, pair: str, conv: nn.Module, call: Call, device: str) -> dict[str, Any]:
    weight: Any = conv.weight
    sizes = Sizes(*(shape.numel() * weight.itemsize for shape in (call.shape, weight.shape, call.output)))
    form, counted_form = (
        cheapest_form(weight.numel(), call.output.numel(), kind, gamma_trains=True)
        for kind in (device, "cpu")
    )
    return _row(
        model=model,
        pair=pair,
        form=form.name.lower(),
        shapes={"input": [*call.shape], "weight": [*weight.shape], "output": [*call.output]},
        predicted=predicted_bytes(sizes, counted_form),
        traffic=predicted_traffic(sizes, form, conv.bias is not None, call.requires_grad),
    )


def predicted_bytes(sizes: Sizes, form: Form) -> dict[str, int]:
    """What a pair saves for the backward pass: its input, and in Eval mode its convolution's output.

    Args:
        sizes: Of the pair.
        form: How Tune mode computes it; where it is left apart, it saves what Eval mode does.

    Returns:
        Bytes by mode.
    """
    both = sizes.input + sizes.output
    return {EVAL: both, TUNE: both if form is Form.APART else sizes.input, DEPLOY: sizes.input}


def predicted_traffic(sizes: Sizes, form: Form, has_bias: bool, input_wants_gradient: bool) -> int:
    """The bytes that Tune mode need not read or write in a forward and backward pass, by the module's table.

    Args:
        sizes: Of the pair.
        form: How Tune mode computes it.
        has_bias: Whether the convolution has a bias.
        input_wants_gradient: Whether the fused weight is needed again in the backward pass.

    Returns:
        Eval's traffic less Tune's; negative where the weight is so large that fusing costs traffic.
    """
    in_eval_mode = 5 * sizes.output + has_bias * sizes.output
    in_tune_mode = {
        Form.FOLDED: (8 if input_wants_gradient else 6) * sizes.weight + sizes.output,
        Form.SCALED: 2 * sizes.weight + 5 * sizes.output,
        Form.APART: in_eval_mode,
    }[form]
    return in_eval_mode - in_tune_mode


# --- Timed alone --------------------------------------------------------------------------------------------------


def _steps(conv: nn.Module, norm: nn.Module, call: Call, device: str) -> dict[str, Callable[[], object]]:
    """A forward and backward pass of one pair: its two modules, and what a rewritten graph calls."""
    conv, norm = copy.deepcopy((conv, norm))
    for module in (conv, norm):
        module.to(device).to(memory_format=torch.channels_last)
    batch = images(call.shape, device).requires_grad_(call.requires_grad)
    with torch.no_grad():
        gradient = images(norm(conv(batch)).shape, device)
    inputs = [*conv.parameters(), *norm.parameters(), *([batch] if call.requires_grad else [])]

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        # Not a sum's gradient, whose elements lie in one place and would have to be spread out first.
        return lambda: torch.autograd.grad(forward(), inputs, gradient)

    return {
        EVAL: step(lambda: norm(conv(batch))),
        TUNE: step(lambda: conv_batch_norm(conv, norm, batch)),
    }


class Bandwidth(NamedTuple):
    """Time saved against traffic saved, over pairs.

    Attributes:
        fitted: GB/s of the line through the origin that fits best; None if it does not rise.
        lower: Lower quartile of the pairs' own GB/s, None likewise.
        upper: Upper quartile, None likewise.
    """

    fitted: float | None
    lower: float | None
    upper: float | None


def bandwidth(traffic: Sequence[float], saved: Sequence[float]) -> Bandwidth:
    """How fast memory would have to be for the traffic to explain the time.

    Args:
        traffic: Bytes saved by each pair, two pairs at least.
        saved: Seconds saved by each pair.

    Returns:
        The fit, and the quartiles of the pairs.
    """
    slope = sum(x * y for x, y in zip(traffic, saved, strict=True)) / sum(x * x for x in traffic)
    # Quartiles of seconds per byte: unlike bytes per second, they stay in order where little time is saved, or less
    # than none.
    per_byte = [y / x for x, y in zip(traffic, saved, strict=True)]
    quick, _, slow = statistics.quantiles(per_byte, n=4, method="inclusive")
    return Bandwidth(*(1e-9 / each if each > 0 else None for each in (slope, slow, quick)))


def _seconds_saved(row: Mapping[str, Any]) -> float:
    """Median over the rounds; negative where Tune takes longer."""
    rounds = zip(row["seconds"][EVAL], row["seconds"][TUNE], strict=True)
    saved: float = statistics.median(in_eval_mode - in_tune_mode for in_eval_mode, in_tune_mode in rounds)
    return saved


# --- Shown --------------------------------------------------------------------------------------------------------


def misfit(row: Mapping[str, Any], mode: str) -> float:
    """Measured bytes less predicted ones, as part of those."""
    predicted: float = row["predicted"][mode]
    measured: float = row["measured"][mode]
    return measured / predicted - 1


def _notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    pairs = [row for row in rows if row["pair"]]
    worst, mode = max(
        ((row, mode) for row in pairs for mode in MODES), key=lambda item: abs(misfit(item[0], item[1]))
    )
    label = f"{worst['model']}'s {worst['pair']}"
    if misfit(worst, mode) == 0:
        yield f"No pair misfits: all {len(pairs)} save what their shapes predict, to the byte."
    else:
        yield (
            f"The largest misfit is that of {label} in {mode} mode: {worst['measured'][mode]:,} bytes measured, "
            f"{worst['predicted'][mode]:,} predicted ({100 * misfit(worst, mode):+.2g} %)."
        )
    for row in rows:
        if row["pair"] is None:
            yield _explained(row, [pair for pair in pairs if pair["model"] == row["model"]])
    yield (
        "Time is saved in medians over rounds in which the pair's two modules and the fused pair take turns, alone. "
        "GB/s is the traffic saved by the time saved: of the line through the origin, and the quartiles of the pairs "
        f"whose scale goes to the weight; {NOTHING} where Tune takes longer. The table is of traffic that cannot be "
        "avoided; kernels that read a tensor twice, or out of a cache, show as a bandwidth that the memory has not."
    )


def _explained(model: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> str:
    """Why a model's total is not the sum of its pairs, from what was measured."""
    parts = []
    for mode in MODES:
        of_pairs = sum(row["measured"][mode] for row in pairs)
        shared, others, total = model["shared"][mode], model["others"][mode], model["measured"][mode]
        rest = total - (of_pairs - shared + others)
        part = f"{mode}: {of_pairs:,} bytes in the pairs - {shared:,} + {others:,} = {total:,}"
        parts.append(part if rest == 0 else f"{part}, but for {rest:+,} that this does not explain")
    return (
        f"{model['model']}'s total is the sum of its pairs, less what two pairs share, plus what only other layers "
        f"save. {'; '.join(parts)}."
    )


def tables(result: Result) -> Iterator[str]:
    """The models' bytes, the models' time, the pairs.

    Args:
        result: The benchmark's.

    Yields:
        Markdown.
    """
    models = [row for row in result.rows if row["pair"] is None]
    pairs = [row for row in result.rows if row["pair"]]
    yield table(
        (
            "MB saved for the backward pass",
            "pairs, predicted",
            "pairs, measured",
            "largest misfit, %",
            "shared by pairs",
            "others'",
            "whole model",
        ),
        (
            _line_of_model(model, mode, [row for row in pairs if row["model"] == model["model"]])
            for model in models
            for mode in MODES
        ),
    )
    whole = [
        (model["model"], [model["measured"][EVAL], model["measured"][TUNE], model["with_activations"]])
        for model in models
        if model.get("with_activations") is not None  # results of before have none
    ]
    if whole:
        yield table(
            ("MB of the whole model", EVAL, "pairs alone", "with activations", "/ Eval", "/ pairs alone"),
            (
                (name, *map(megabytes, kept), *(f"{kept[2] / other:.3f}" for other in kept[:2]))
                for name, kept in whole
            ),
        )
    yield table(
        ("time", "pairs folded", "GB of traffic saved", "ms saved", "GB/s", "quartiles"),
        (
            _line_of_time(model["model"], [row for row in pairs if row["model"] == model["model"]])
            for model in models
        ),
    )
    yield table(
        (
            "pair",
            "form",
            *(f"{mode}, {what}" for mode in MODES for what in ("predicted MB", "measured MB")),
            "traffic saved, MB",
            "ms saved",
        ),
        (
            (
                f"{row['model']} {row['pair']}",
                row["form"],
                *(megabytes(row[what][mode]) for mode in MODES for what in ("predicted", "measured")),
                f"{row['traffic'] / 1e6:.3g}",
                f"{1e3 * _seconds_saved(row):.3g}",
            )
            for row in pairs
        ),
    )


def _line_of_model(
    model: Mapping[str, Any], mode: str, pairs: Sequence[Mapping[str, Any]]
) -> tuple[object, ...]:
    return (
        f"{model['model']}, {mode}",
        megabytes(model["predicted"][mode]),
        megabytes(sum(row["measured"][mode] for row in pairs)),
        f"{100 * max((misfit(row, mode) for row in pairs), key=abs):.2g}",
        *(megabytes(model[key][mode]) for key in ("shared", "others", "measured")),
    )


def _line_of_time(model: str, pairs: Sequence[Mapping[str, Any]]) -> tuple[object, ...]:
    folded = _folded(pairs)
    # Of less than two pairs there are no quartiles.
    found = bandwidth(*_traffic_and_time(folded)) if len(folded) > 1 else Bandwidth(None, None, None)
    return (
        model,
        f"{len(folded)} of {len(pairs)}",
        f"{sum(row['traffic'] for row in pairs) / 1e9:.3g}",
        f"{1e3 * sum(map(_seconds_saved, pairs)):.3g}",
        _rounded(found.fitted),
        f"{_rounded(found.lower) or NOTHING} to {_rounded(found.upper) or NOTHING}",
    )


def _folded(pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The pairs that save traffic by folding: what the bandwidth is told by."""
    return [row for row in pairs if row["form"] == Form.FOLDED.name.lower() and row["traffic"] > 0]


def _traffic_and_time(pairs: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["traffic"] for row in pairs], [_seconds_saved(row) for row in pairs]


def _rounded(number: float | None) -> str | None:
    return None if number is None else f"{number:.3g}"


def plot(result: Result) -> Figure:
    """Bytes predicted and measured, with the diagonal; traffic predicted and time measured, with the fit.

    Args:
        result: The benchmark's.

    Returns:
        A figure of two panels.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    memory, time = figure.subplots(1, 2)
    pairs = [row for row in result.rows if row["pair"]]
    for mode, marker in zip(MODES, "os^", strict=True):
        predicted, measured = ([row[key][mode] / 1e6 for row in pairs] for key in ("predicted", "measured"))
        memory.loglog(predicted, measured, marker, fillstyle="none", label=mode)
    ends = [bound(row["predicted"][mode] for row in pairs for mode in MODES) / 1e6 for bound in (min, max)]
    memory.plot(ends, ends, color="gray", linewidth=0.8, zorder=0)
    memory.set(xlabel="MB predicted", ylabel="MB measured, saved for the backward pass")
    memory.legend()
    for model in dict.fromkeys(row["model"] for row in pairs):
        traffic, saved = _traffic_and_time([row for row in pairs if row["model"] == model])
        time.plot(
            [each / 1e6 for each in traffic],
            [1e3 * each for each in saved],
            "o",
            fillstyle="none",
            label=model,
        )
    folded = _folded(pairs)
    fitted = bandwidth(*_traffic_and_time(folded)).fitted if len(folded) > 1 else None
    if fitted is not None:
        time.axline((0, 0), slope=1 / fitted, color="gray", linewidth=0.8, label=f"{fitted:.3g} GB/s")
    time.axhline(0, color="black", linewidth=0.5)
    time.set(xlabel="MB of traffic saved, predicted", ylabel="ms saved, measured")
    time.legend()
    return figure
