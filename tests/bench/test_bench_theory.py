"""`python -m bench theory`: what shapes predict is what is counted, and a model's total is explained to the byte."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import convbn_fx
from bench.experiments import theory
from bench.harness.contenders import DEPLOY, EVAL, TUNE
from bench.harness.keeping import keeping
from bench.harness.results import Options, Result, read
from bench.harness.steps import count
from convbn_fx.functional.cost_rule import Form
from convbn_fx.testing import randomize_batchnorms


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theory, "SMOKE", (("unet",), (1, 3, 32, 32)))
        settings, rows, notes = theory.run(Options(smoke=True))
    path = Path(tmp_path_factory.mktemp("theory")) / "result.json"
    Result("theory", "", {}, settings, rows, notes).write(path)
    return read(path)


def pairs_of(result):
    return [row for row in result.rows if row["pair"]]


def test_all_pairs_save_what_their_shapes_predict(result):
    assert len(pairs_of(result)) == 17
    assert {row["form"] for row in pairs_of(result)} == {"folded", "scaled", "apart"}
    for row in pairs_of(result):
        assert row["measured"] == row["predicted"], row["pair"]


def test_the_total_is_explained_to_the_byte(result):
    (model,) = [row for row in result.rows if row["pair"] is None]
    for mode in (EVAL, TUNE, DEPLOY):
        of_pairs = sum(row["measured"][mode] for row in pairs_of(result))
        assert model["measured"][mode] == of_pairs - model["shared"][mode] + model["others"][mode]
    assert not any("does not explain" in note for note in result.notes)


def test_activations_save_no_more_than_pairs_alone(result):
    (model,) = [row for row in result.rows if row["pair"] is None]
    assert model["with_activations"] <= model["measured"][TUNE]


def test_every_pair_was_timed_in_turns(result):
    for row in pairs_of(result):
        assert len(row["seconds"][EVAL]) == len(row["seconds"][TUNE]) >= 2


def test_tables_and_plot(result):
    models, activations, time, pairs = theory.tables(result)
    assert activations.count("\n| unet | ") == 1
    assert models.count("\n| unet, ") == 3
    assert "| unet | 5 of 17 |" in time
    assert pairs.count("\n| unet ") == 17
    memory, seconds = theory.plot(result).axes
    assert [len(line.get_xdata()) for line in memory.lines[:3]] == [17, 17, 17]
    assert len(seconds.lines[0].get_xdata()) == 17


def test_a_misfit_is_named(result):
    rows = json.loads(json.dumps(result.rows))
    rows[3]["measured"][TUNE] *= 2
    note = next(theory._notes(rows))
    assert f"unet's {rows[3]['pair']} in Tune mode" in note
    assert "+1e+02 %" in note
    assert any("that this does not explain" in note for note in theory._notes(rows))


class TwoReadOne(nn.Module):
    """Two convolutions on one tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.left_norm, self.right_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, input):
        input = self.first(input)
        return self.left_norm(self.left(input)).sigmoid() + self.right_norm(self.right(input))


def test_what_two_pairs_share_counts_once():
    model = randomize_batchnorms(TwoReadOne().eval())
    graph = convbn_fx.symbolic_trace(model)
    tuned = convbn_fx.transform(graph)
    size = 2 * 4 * 16 * 16 * 4
    for variant, saved in ((graph, 3), (tuned, 1)):
        kept = keeping(variant, (2, 4, 16, 16), convbn_fx.report(tuned).fused)
        assert sorted(kept.shared) == [0, size]
        assert kept.others == 2 * size  # the image, which `first` saves, and the sigmoid's output
        assert count(variant, (2, 4, 16, 16)) == (saved + 2) * size


def test_traffic_of_each_form():
    sizes = theory.Sizes(input=10, weight=100, output=1000)
    assert (
        theory.predicted_traffic(sizes, Form.FOLDED, has_bias=False, input_wants_gradient=True) == 4000 - 800
    )
    assert (
        theory.predicted_traffic(sizes, Form.FOLDED, has_bias=True, input_wants_gradient=False) == 5000 - 600
    )
    assert theory.predicted_traffic(sizes, Form.SCALED, has_bias=False, input_wants_gradient=True) == -200
    assert theory.predicted_traffic(sizes, Form.APART, has_bias=True, input_wants_gradient=True) == 0
    assert theory.predicted_bytes(sizes, Form.APART) == {EVAL: 1010, TUNE: 1010, DEPLOY: 10}


def test_bandwidth():
    exact = theory.bandwidth([1e9, 2e9, 3e9], [0.1, 0.2, 0.3])
    assert exact == pytest.approx((10, 10, 10))
    spread = theory.bandwidth([1e9, 1e9, 1e9], [0.1, 0.2, -0.1])
    assert spread.fitted == pytest.approx(15)
    assert spread.lower == pytest.approx(1 / 0.15)
    assert spread.upper is None
    assert theory.bandwidth([1e9, 1e9], [-0.1, -0.2]) == (None, None, None)


def test_both_steps_of_a_pair_compute_the_same_gradients(monkeypatch):
    conv = nn.Conv2d(3, 4, 3).double()
    norm = randomize_batchnorms(nn.BatchNorm2d(4)).double().eval()
    monkeypatch.setattr(theory, "images", lambda shape, device: torch.randn(shape, dtype=torch.float64))
    spec = theory.Call(torch.Size((2, 3, 32, 32)), requires_grad=True, output=torch.Size((2, 4, 30, 30)))
    in_eval_mode, in_tune_mode = (step() for step in theory._steps(conv, norm, spec, "cpu").values())
    assert len(in_eval_mode) == 5
    torch.testing.assert_close(in_tune_mode, in_eval_mode, rtol=1e-10, atol=1e-10)
