"""How all tests run: one thread, one seed, and a hypothesis profile named by HYPOTHESIS_PROFILE."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, settings
from torch_alone import left_out

# Tests use the operator in C++ where it is built (`make setup` builds it), and build none, nor do their processes.
from convbn_fx.functional import cost_rule as costs
from convbn_fx.functional import native

if native.operator is None:
    os.environ["CONVBN_FX_NATIVE"] = "0"

# On tensors as small as the tests', a second thread only waits; and two runs of one test give the same bits.
torch.set_num_threads(1)

# Small outputs run apart, to save time; the tests' are small in order that every form of a pair runs in each of them.
_SHIPPED = costs.COSTS["cpu"]
costs.COSTS["cpu"] = replace(_SHIPPED, fixed=0)

# No deadlines: the first examples pay for torch's lazy imports. No explanations: they trace every line of PyTorch's
# Python, which takes minutes.
_PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("dev", max_examples=100, deadline=None, phases=_PHASES)
settings.register_profile(
    "ci", settings.get_profile("dev"), max_examples=150, derandomize=True, print_blob=True
)
settings.register_profile("thorough", settings.get_profile("dev"), max_examples=1500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


collect_ignore = left_out()


def pytest_report_header(config):
    lines = [f"operator: {'plain operations' if native.operator is None else 'C++'}"]
    if collect_ignore:
        lines.append(f"{len(collect_ignore)} files left out: {' '.join(collect_ignore)}")
    return lines


def pytest_configure(config):
    # torch says so once per process, in whichever test comes first; that padding is what the test is about.
    message = "ignore:Using padding='same' with even kernel lengths:UserWarning"
    config.addinivalue_line("filterwarnings", message)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def _fresh_compiler():
    """Nothing compiled before, nothing left for the tests after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def plain_operations(monkeypatch):
    """As where there is no compiler."""
    monkeypatch.setenv("CONVBN_FX_NATIVE", "0")
    monkeypatch.setattr(native, "operator", None)
    monkeypatch.setattr(native, "calls", None)


@pytest.fixture
def real_costs(monkeypatch):
    """The rule as users have it."""
    monkeypatch.setitem(costs.COSTS, "cpu", _SHIPPED)
