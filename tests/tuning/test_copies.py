"""State dicts and checkpoints; copies, pickles, models that are tuned again."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ALL_NET_PAIRS, Net, data, net, prepared, runs_fused, through_pickle, through_torch_save
from torch import nn

from convbn_fx import report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning")


def test_the_state_dict():
    model = net()
    tuned = tune(model)
    assert list(tuned.state_dict()) == list(model.state_dict())
    for kind in ("parameters", "buffers"):
        mine, theirs = (dict(getattr(m, f"named_{kind}")()) for m in (model, tuned))
        assert mine.keys() == theirs.keys()
        assert all(theirs[name] is tensor for name, tensor in mine.items())


def test_checkpoints_move_freely():
    model, another = net(), prepared(Net())
    tuned, copied = tune(model), copy.deepcopy(tune(another))
    for source, target in ((another, tuned), (copied, model), (tuned, another)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(1)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target(X), source(X))
    assert_equivalent(model, tuned, X)


@pytest.fixture(params=[copy.copy, copy.deepcopy, through_pickle, through_torch_save])
def copied(request):
    return request.param


@pytest.mark.parametrize("times", [1, 2])
def test_a_copy_is_still_fused(copied, times):
    model = net()
    duplicate = tune(model)
    for _ in range(times):
        duplicate = copied(duplicate)
    assert len(report(duplicate).fused) == ALL_NET_PAIRS
    assert isinstance(duplicate, Net)
    assert_equivalent(model, duplicate, X)
    assert runs_fused(model, duplicate)
    for m in (model, duplicate):
        m.train()
        m.dropout.eval()
    assert_equivalent(model, duplicate, X)


def test_a_copy_of_a_pair_across_borders(crossing, copied):
    duplicate = copied(tune(crossing))
    assert_equivalent(crossing, duplicate, X)
    assert runs_fused(crossing, duplicate)


def test_a_copy_of_a_part(crossing, copied):
    tuned = tune(crossing)
    assert_equivalent(crossing.blocks[0], copied(tuned.blocks[0]), X)


def test_a_deep_copy_is_on_its_own():
    model = net()
    tuned = tune(model)
    duplicate = copy.deepcopy(tuned)
    assert not {id(p) for p in duplicate.parameters()} & {id(p) for p in model.parameters()}
    before = tuned(X).detach()
    with torch.no_grad():
        for tensor in (*duplicate.parameters(), *duplicate.buffers()):
            tensor.add_(1)
    torch.testing.assert_close(tuned(X), before)


FRESH = """
import sys, torch, convbn_fx
model, tuned, x = torch.load(sys.argv[1], weights_only=False)
convbn_fx.testing.assert_equivalent(model, tuned, x)
assert len(convbn_fx.report(tuned).fused) == 4
assert convbn_fx.memory.saved_bytes(tuned, x) < convbn_fx.memory.saved_bytes(model, x)
"""


def test_loaded_in_a_fresh_process(tmp_path):
    model = net()
    torch.save((model, tune(model), X), tmp_path / "model.pt")
    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, "-W", "error", "-c", FRESH, str(tmp_path / "model.pt")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})


def test_tuned_again():
    model = net()
    tuned = tune(tune(model))
    assert report(tuned) == report(tune(model))
    assert type(tuned).__mro__[1:] == type(tune(model)).__mro__[1:]
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned)


def test_tuned_again_the_first_lives_on():
    model = net()
    first = tune(model)
    second = tune(first, modules=["stem"])
    assert len(report(first).fused) == ALL_NET_PAIRS
    assert len(report(second).fused) == 1
    assert saved_bytes(first, X) < saved_bytes(second, X) < saved_bytes(model, X)
    assert_equivalent(first, second, X)


def test_a_tuned_part_of_a_larger_model():
    model = net()
    larger = nn.Sequential(tune(model), nn.Linear(5, 2).double())
    assert len(report(larger).fused) == ALL_NET_PAIRS
    assert runs_fused(model, larger[0])
    assert len(report(tune(larger)).fused) == ALL_NET_PAIRS
