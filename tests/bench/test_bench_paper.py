"""The paper's numbers beside ours: the same rows, as shares of the same, and why where ours are less good."""

import pytest

from bench import paper
from bench.harness.contenders import DEPLOY, EVAL, TUNE
from bench.harness.results import RESULTS, Result, read


def grid(tune_bytes, tune_seconds):
    row = {
        "model": "resnet50",
        "batch": 32,
        "size": 224,
        "bytes": {EVAL: 1000, TUNE: tune_bytes, DEPLOY: 500},
        "seconds": {EVAL: [1.0, 1.0], TUNE: [tune_seconds] * 2, DEPLOY: [0.5, 0.5]},
    }
    return Result("resnet50-grid", "", {}, {}, [row])


def test_shares_of_the_same_row():
    tune, deploy = paper.TABLES["resnet50-grid"].beside(grid(480, 0.9))
    assert tune.label == "32x224, Tune"
    assert tune.memory == pytest.approx((1.5973 / 2.8237, 0.48))
    assert tune.time == pytest.approx((0.0849 / 0.0945, 0.9))
    assert deploy.memory == pytest.approx((1.5619 / 2.8237, 0.5))


def test_what_is_less_good_says_why():
    assert "Less good" not in "".join(paper.beside(grid(480, 0.8)))
    text = "".join(paper.beside(grid(600, 0.95)))
    assert "in memory: 32x224, Tune. Why: " in text
    assert "in time: 32x224, Tune. Why: " in text


def test_what_was_not_timed_has_a_dash():
    result = grid(480, 0.9)
    result.rows[0]["seconds"] = None
    tune, _ = paper.TABLES["resnet50-grid"].beside(result)
    assert tune.time[1] is None
    assert "| 32x224, Tune | 0.566 | 0.480 | 0.898 | \N{EN DASH} |" in "".join(paper.beside(result))


def test_an_experiment_that_the_paper_has_not_has_nothing_beside_it():
    assert not list(paper.beside(Result("theory", "", {}, {}, [])))


@pytest.mark.parametrize(
    ("benchmark", "count"),
    [
        ("resnet50-grid", 24),
        ("classification", 9),
        ("detection", 14),
        ("adversarial", 6),
        ("alternatives", 2),
    ],
)
def test_the_committed_results_have_the_papers_rows(benchmark, count):
    result = read(RESULTS / f"{benchmark}.json")
    found = list(paper.TABLES[benchmark].beside(result))
    assert len(found) == count
    assert all(0 < share < 1.5 for row in found for share in row.memory if share is not None)
