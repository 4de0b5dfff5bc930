"""A test of the tests: each mutant of the arithmetic is noticed, and would not be on a new layer's statistics."""

import pytest
from mutants import MUTANTS, Mutant, core_check, upstream_check

# They are mutants of the Python; of the operator in C++ it is tested that it passes the check that kills them all.
pytestmark = pytest.mark.usefixtures("plain_operations")

each_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


def test_the_right_arithmetic_passes():
    core_check()
    core_check(randomized=False)
    upstream_check()


@each_mutant
def test_every_mutant_is_killed(mutant, monkeypatch):
    mutant.install(monkeypatch)
    with pytest.raises(AssertionError):
        core_check()


@each_mutant
def test_initial_statistics_would_hide_mutants(mutant, monkeypatch):
    """Mean 0, variance 1, gamma 1 and beta 0 hide these even from gradients in float64."""
    mutant.install(monkeypatch)
    hidden = {
        "variance ignored",
        *("mean ignored", "mean added", "mean added to a bias"),
        *("gradient of gamma without the mean", "scaled: gradient of gamma without the mean"),
    }
    assert passes(lambda: core_check(randomized=False)) == (mutant.name in hidden)


@each_mutant
def test_initial_statistics_and_outputs_in_float32_would_hide_nearly_all(mutant, monkeypatch):
    mutant.install(monkeypatch)
    assert passes(upstream_check) == (mutant.name != "bias of the convolution dropped")


def passes(check):
    try:
        check()
    except AssertionError:
        return False
    return True


def test_an_edit_that_no_longer_applies_says_so(monkeypatch):
    with pytest.raises(LookupError, match=r"'no such thing' is not once in functional.arithmetic\.scale_of"):
        Mutant("stale", "functional.arithmetic.scale_of", "no such thing", "").install(monkeypatch)
