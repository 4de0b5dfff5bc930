"""The sentences of the benchmarks' page on where another contender is better."""

import pytest

from bench.harness.better import Case, advantages, better_than_tune
from bench.harness.contenders import COMPILED_CONVBN, COMPOSITE, DEPLOY, EVAL, TUNE


def sentences(bytes_, seconds):
    return list(better_than_tune([Case("here", bytes_, seconds)]))


def test_who_saves_less_is_named():
    assert sentences({EVAL: 200, TUNE: 100, DEPLOY: 98}, {}) == ["Deploy takes less memory: here (0.98)."]


@pytest.mark.parametrize("deploy", [99, 100, 101, None])
def test_less_than_a_hundredth_is_no_advantage(deploy):
    assert not sentences({TUNE: 100, DEPLOY: deploy}, {})


def test_who_is_faster_is_named():
    seconds = {
        TUNE: [2.0, 4.0, 2.0, 4.0],
        COMPOSITE: [1.5, 3.0, 1.5, 3.0],
        EVAL: [3.0, 5.0, 3.0, 5.0],
        DEPLOY: None,
    }
    assert sentences({}, seconds) == ["composite Tune takes less time: here (0.75)."]


def test_faster_in_every_other_round_is_not_faster():
    assert not sentences({}, {TUNE: [2.0, 2.0, 2.0, 2.0], COMPOSITE: [1.0, 1.0, 3.0, 3.0]})


def test_tune_mode_under_a_compiler_is_tune_mode():
    assert not sentences({TUNE: 100, COMPILED_CONVBN: 50}, {TUNE: [2.0, 2.0], COMPILED_CONVBN: [1.0, 1.0]})


def test_all_places_are_in_one_sentence():
    cases = [Case(label, {TUNE: 100, DEPLOY: 50}, {}) for label in ("here", "there")]
    assert list(better_than_tune(cases)) == ["Deploy takes less memory: here (0.50); there (0.50)."]


def test_an_advantage_tells_of_how_many_cases():
    cases = [Case(str(bytes_), {TUNE: 100, DEPLOY: bytes_}, {}) for bytes_ in (50, 80, 100)]
    assert advantages(cases) == [(DEPLOY, "memory", {"50": 0.5, "80": 0.8}, 3)]
