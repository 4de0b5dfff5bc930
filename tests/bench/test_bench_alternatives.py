"""`python -m bench alternatives`, and the parts that it shares with others: the peak, the turns, Inplace-ABN."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet

import convbn_fx
from bench.experiments import alternatives
from bench.harness import contenders
from bench.harness.contenders import (
    CHECKPOINT,
    COMPILED,
    COMPILED_CONVBN,
    COMPILED_FLAG,
    COMPOSITE,
    DEPLOY,
    EVAL,
    FROZEN,
    HALF_BUDGET,
    INPLACE,
    PAIRS,
    SELECTIVE,
    THIRD_BUDGET,
    TRAIN,
    TUNE,
    TUNE_CHECKPOINT,
)
from bench.harness.inplace_abn import with_inplace_abn
from bench.harness.results import Options, Result, read
from bench.harness.steps import count, counted_peak, images, peak, training_step
from bench.harness.timing import take_turns
from convbn_fx.testing import randomize_batchnorms

pytestmark = pytest.mark.slow  # the benchmark runs, at toy size

SHAPE = (2, 3, 32, 32)


def block():
    """As few layers as will do: compiling takes its time."""
    shortcut = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
    return nn.Sequential(Bottleneck(3, 2, downsample=shortcut))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alternatives, "_toy", block)
        settings, rows, notes = alternatives.run(Options(smoke=True))
    path = Path(tmp_path_factory.mktemp("alternatives")) / "result.json"
    Result("alternatives", "", {}, settings, rows, notes).write(path)
    return read(path)


@pytest.fixture(scope="module")
def rows(result):
    return {row["contender"]: row for row in result.rows}


def test_every_contender_has_a_row_of_the_same_keys(rows):
    assert tuple(rows) == alternatives.CONTENDERS
    assert len({tuple(row) for row in rows.values()}) == 1
    measured = [name for name, row in rows.items() if row["seconds"] is not None]
    assert measured == [name for name in rows if name != INPLACE]
    assert len({len(rows[name]["seconds"]) for name in measured}) == 1


def test_what_could_not_be_measured_says_why(rows, result):
    row = rows[INPLACE]
    assert all(row[key] is None for key in ("peak", "seconds", "float32", "float64", "trains"))
    assert "inplace_abn" in row["reason"]
    assert f"{INPLACE} of toy was not measured: {row['reason']}" in result.notes


def test_all_but_train_mode_compute_the_same(rows):
    for name, row in rows.items():
        if name not in (TRAIN, INPLACE):
            assert row["float32"] < 1e-5, name
        if name in alternatives.EAGER_CONTENDERS and name != TRAIN:
            assert row["float64"] < 1e-13, name
    assert rows[TRAIN]["float64"] > 1e-3


def test_gamma_and_beta_train_where_they_are_there(rows):
    without = {name for name, row in rows.items() if row["trains"] is False}
    assert without == {DEPLOY, FROZEN}


def test_all_pairs_are_fused(rows):
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in block().modules())
    fused = {name: row["pairs"] for name, row in rows.items() if row["pairs"]}
    assert fused == dict.fromkeys((TUNE, PAIRS, COMPOSITE, TUNE_CHECKPOINT, COMPILED_CONVBN), norms)


def test_memory(rows):
    for batch in ("2", "4"):
        saved = {name: row["bytes"][batch] for name, row in rows.items()}
        assert saved[TUNE] < 0.6 * saved[EVAL]
        assert saved[TUNE_CHECKPOINT] <= saved[CHECKPOINT] < saved[SELECTIVE] < saved[EVAL]
        assert saved[TUNE] <= saved[PAIRS]
        peaks = {name: row["counted_peak"][batch] for name, row in rows.items()}
        assert peaks[TUNE] < peaks[EVAL]
        assert peaks[TUNE_CHECKPOINT] < peaks[CHECKPOINT] <= peaks[EVAL]  # of one block nothing is gained
    assert rows[THIRD_BUDGET]["bytes"]["2"] < rows[HALF_BUDGET]["bytes"]["2"] < rows[EVAL]["bytes"]["2"]
    assert rows[COMPILED]["bytes"]["2"] == rows[EVAL]["bytes"]["2"]  # aot_eager saves what Eval does
    assert all(row["peak"] for name, row in rows.items() if name != INPLACE)


def test_tables_and_plot(result):
    meanings, *numbers = alternatives.tables(result)
    for name in alternatives.CONTENDERS:
        assert f"- **{name}**" in meanings
        for table in numbers:
            assert table.count(f"\n| {name} |") == 1
    figure = alternatives.plot(result)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(alternatives.CONTENDERS) - 1
    saved, highest = figure.axes
    drawn = [sum(len(line.get_xdata()) for line in panel.lines) for panel in (saved, highest)]
    assert drawn == [len(alternatives.CONTENDERS) - 1] * 2


def test_a_compiler_that_fails_is_a_row_with_a_reason(monkeypatch):
    def fail(_model):
        raise RuntimeError("no compiler here\nand more")

    makers = dict.fromkeys((COMPILED, COMPILED_FLAG, COMPILED_CONVBN), fail)
    monkeypatch.setattr(alternatives, "SMOKE_COMPILERS", makers)
    rows = {
        name: alternatives._empty_row("toy", name, alternatives.SMOKE) for name in alternatives.CONTENDERS
    }
    options = Options(smoke=True)
    assert alternatives._compiled_and_extended(rows, block(), images(SHAPE, "cpu"), options) == {}
    assert rows[COMPILED]["reason"] == "no compiler here"


# --- What the benchmarks share ------------------------------------------------------------------------------------


def plain():
    """Without sums of gradients, and with small weights."""
    channels = (3, 8, 8, 8)
    layers = [
        layer
        for inputs, outputs in pairwise(channels)
        for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
    ]
    return randomize_batchnorms(nn.Sequential(*layers).eval())


@pytest.mark.parametrize(
    "make", [lambda model: model, convbn_fx.tune, convbn_fx.deploy], ids=[EVAL, TUNE, DEPLOY]
)
def test_the_counted_peak_is_that_of_a_real_step(make):
    model = make(plain())
    shape = (4, 3, 64, 64)
    measured = peak(training_step(model, images(shape, "cpu")), "cpu")
    assert 0.8 * measured <= counted_peak(model, shape) <= 1.05 * measured


def test_the_counted_peak_sees_a_pair_fused():
    """A tracker with hooks on modules would count Eval mode's two steps."""
    model = plain()
    tuned = counted_peak(convbn_fx.tune(model), SHAPE)
    assert tuned < 0.8 * counted_peak(model, SHAPE)
    assert tuned > count(convbn_fx.tune(model), SHAPE)


def test_the_counted_peak_sees_what_is_recomputed():
    model = nn.Sequential(*(plain()[3:] for _ in range(3)))
    recomputed = contenders.checkpointed(model, lambda module: isinstance(module, nn.Sequential))
    shape = (2, 8, 32, 32)
    assert counted_peak(recomputed, shape) < 0.8 * counted_peak(model, shape)


def test_a_step_leaves_no_gradients():
    model = plain()
    training_step(model, images(SHAPE, "cpu"))()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_contender_is_at_every_place_of_a_round():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abcdefgh"}
    ticks = iter(range(10**6))
    times = take_turns(steps, seconds=500, clock=lambda: next(ticks))
    rounds = [order[start : start + 8] for start in range(8, len(order), 8)]
    assert all(sorted(turn) == list(steps) for turn in rounds)
    assert all({turn[place] for turn in rounds} == set(steps) for place in (0, 7))
    assert {len(each) for each in times.values()} == {len(rounds)}


def test_no_more_rounds_than_settle_quartiles():
    assert {len(times) for times in take_turns({"a": int, "b": int}, seconds=60, max_rounds=5).values()} == {
        5
    }


def test_frozen_batch_norms_keep_the_dtype():
    model = plain().double()
    assert {buffer.dtype for buffer in contenders.frozen(model).buffers()} == {torch.float64}


class StandIn(nn.Module):
    """What the network sees of InPlaceABN: its arguments, its names, its place."""

    def __init__(self, num_features, eps, activation):
        super().__init__()
        self.weight = self.bias = None
        self.eps, self.activation = eps, activation

    def forward(self, input):
        output = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return F.relu(output) if self.activation == "leaky_relu" else output


def test_inplace_abn_takes_over_batch_norms_and_their_activations():
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4, width_per_group=4)
    model = randomize_batchnorms(model.eval()).double()
    candidate = with_inplace_abn(model, StandIn)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in candidate.modules())
    activated = [m.activation == "leaky_relu" for m in candidate.modules() if isinstance(m, StandIn)]
    assert (len(activated), sum(activated)) == (17, 9)
    batch = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(candidate(batch), model(batch), rtol=1e-12, atol=1e-12)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert {*map(id, candidate.parameters())} == {*map(id, model.parameters())}


def test_inplace_abn_that_is_there_is_measured(monkeypatch):
    class Package:
        InPlaceABN = StandIn

    monkeypatch.setitem(sys.modules, "inplace_abn", Package)
    monkeypatch.setattr(alternatives, "SMOKE_COMPILERS", {})
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4, width_per_group=4).eval()
    rows = {INPLACE: alternatives._empty_row("toy", INPLACE, alternatives.SMOKE)}
    modules = alternatives._compiled_and_extended(rows, model, images(SHAPE, "cpu"), Options(smoke=True))
    assert list(modules) == [INPLACE]
    assert rows[INPLACE]["reason"] == ""
