"""batchnorm_mode: batch norms, and nothing else, change their mode; tune(norm_eval=True): they keep theirs."""

import copy

import pytest
import torch
from models import Functional, Net, Pair, data, modes, net, prepared, snapshot, through_pickle
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

import convbn_fx
from convbn_fx import batchnorm_mode, report, transform, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(4, 3, 6, 6)
NORMS = {"stem.norm", "block.first.norm", "block.second.norm", "unused.1"}


def in_train_mode(model):
    return {name for name, training in modes(model).items() if training}


def frozen_by_hand(model):
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


@pytest.fixture(params=["model", "tuned", "tuned for training", "transformed", "traced", "copied"])
def model(request):
    """The network, in Eval mode, and what is made of it."""
    return {
        "model": lambda m: m,
        "tuned": tune,
        "tuned for training": lambda m: tune(m, include_training=True),
        "transformed": lambda m: transform(convbn_fx.symbolic_trace(m)),
        "traced": torch.fx.symbolic_trace,
        "copied": lambda m: through_pickle(copy.deepcopy(tune(m))),
    }[request.param](net())


# --- A call -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_a_call(model, train, others):
    model.train(others)
    expected = modes(model)
    norms = NORMS & expected.keys()
    assert len(norms) >= 3
    batchnorm_mode(model, train=train)
    assert modes(model) == expected | dict.fromkeys(norms, train)


def test_eval_mode_is_the_default():
    model = net().train()
    batchnorm_mode(model)
    assert NORMS.isdisjoint(in_train_mode(model))
    assert "dropout" in in_train_mode(model)


@pytest.mark.parametrize("made", [tuple, list, iter, dict.fromkeys])
def test_some_modules(made):
    model = net()
    batchnorm_mode(model, train=True, modules=made(["block", "unused.1"]))
    assert in_train_mode(model) == NORMS - {"stem.norm"}


def test_no_modules():
    model = net()
    batchnorm_mode(model, train=True, modules=[])
    assert not in_train_mode(model)


def test_a_name_that_begins_like_another():
    model = prepared(nn.ModuleDict({"a": nn.BatchNorm2d(2), "ab": nn.BatchNorm2d(2)}))
    batchnorm_mode(model, True, ["a"])
    assert in_train_mode(model) == {"a"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([*"ab"],), TypeError, "Module"),
        ((Net,), TypeError, "Module"),
        ((net(), True, "block"), TypeError, "list of names"),
        ((net(), True, ["block", "bakbone"]), ValueError, "bakbone"),
        ((net(), True, ["block.first.norm.weight"]), ValueError, "weight"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        batchnorm_mode(*arguments)
    if isinstance(arguments[0], nn.Module):
        assert not in_train_mode(arguments[0])


def test_every_sort_of_batch_norm():
    norms = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), BatchNormAct2d(2)]
    others = [
        nn.GroupNorm(1, 2),
        nn.LayerNorm(2),
        nn.InstanceNorm2d(2, track_running_stats=True),
        nn.Dropout(),
    ]
    model = nn.Sequential(*norms, *others).eval()
    batchnorm_mode(model, train=True)
    assert in_train_mode(model) == {str(index) for index in range(len(norms))}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_batch_norm():
    model = nn.Sequential(nn.LazyBatchNorm2d()).eval()
    batchnorm_mode(model, train=True)
    assert model[0].training
    model(data(2, 3, 4, 4, dtype=torch.float32))
    assert model[0].num_batches_tracked == 1


def test_a_subclass_with_a_forward_of_its_own():
    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Own(2)).eval()
    batchnorm_mode(model, train=True)
    assert model[0].training


def test_the_model_itself_is_a_batch_norm():
    model = nn.BatchNorm2d(2)
    batchnorm_mode(model)
    assert not model.training


def test_what_a_batch_norm_holds_keeps_its_mode():
    model = nn.Sequential(BatchNormAct2d(2, drop_layer=nn.Dropout)).train()
    batchnorm_mode(model)
    assert in_train_mode(model) == {"", "0.drop", "0.act"}


@pytest.mark.parametrize("cls", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_frozen_batch_norms_stay_frozen(cls):
    model = prepared(Pair(nn.Conv2d(3, 4, 3), cls(4)))
    tuned = tune(model)
    batchnorm_mode(tuned, train=True)
    assert_equivalent(model, tuned, X)


def test_a_shared_batch_norm():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Sequential(norm))
    with batchnorm_mode(model, train=False):
        assert not norm.training
    assert norm.training


# --- A context ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_every_batch_norm_is_put_back(model, train):
    model.train()
    model.get_submodule("stem.norm").eval()
    model.get_submodule("block.first.conv").eval()
    before = modes(model)
    with batchnorm_mode(model, train=train):
        assert modes(model) == before | dict.fromkeys(NORMS & before.keys(), train)
    assert modes(model) == before


def test_every_batch_norm_is_put_back_when_the_body_raises():
    model = net()
    model.stem.norm.train()
    before = modes(model)
    with pytest.raises(KeyError, match="body"), batchnorm_mode(model, train=True):
        raise KeyError("body")
    assert modes(model) == before


def test_modes_switched_inside():
    model = net()
    before = modes(model)
    with batchnorm_mode(model, train=True):
        model.train()
    assert {name: mode for name, mode in modes(model).items() if name in NORMS} == dict.fromkeys(NORMS, False)
    assert in_train_mode(model) == before.keys() - NORMS


def test_nested():
    model = net()
    with batchnorm_mode(model, train=True):
        with batchnorm_mode(model, train=False, modules=["block"]):
            assert in_train_mode(model) == {"stem.norm", "unused.1"}
            with batchnorm_mode(model, train=True, modules=["block.first"]):
                assert in_train_mode(model) == {"stem.norm", "unused.1", "block.first.norm"}
            assert in_train_mode(model) == {"stem.norm", "unused.1"}
        assert in_train_mode(model) == NORMS
    assert not in_train_mode(model)


def test_the_name_of_the_context():
    with batchnorm_mode(net()) as context:
        assert isinstance(context, batchnorm_mode)


def test_nothing_else_of_the_model_changes():
    model = net()
    before = snapshot(model)
    with batchnorm_mode(model, train=True):
        pass
    assert snapshot(model) == before


def test_a_tuned_model_follows():
    model = net()
    tuned = tune(model)
    fused, apart = saved_bytes(tuned, X), saved_bytes(model, X)
    assert fused < apart
    with batchnorm_mode(tuned, train=True), batchnorm_mode(model, train=True):
        assert_equivalent(model, tuned, X)
        assert saved_bytes(tuned, X) == saved_bytes(model, X)
    assert saved_bytes(tuned, X) == fused
    with (
        batchnorm_mode(tuned, train=True, modules=["stem"]),
        batchnorm_mode(model, train=True, modules=["stem"]),
    ):
        assert_equivalent(model, tuned, X)


def test_the_original_keeps_its_modes():
    model = net()
    tuned = tune(model)
    batchnorm_mode(tuned, train=True)
    assert not in_train_mode(model)


def test_a_model_whose_batch_norm_is_a_function():
    """Has no batch norm that could be switched; it is left alone."""

    class Own(Functional):
        def forward(self, x):
            y = F.conv2d(x, self.weight, self.bias)
            return F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, training=self.training)

    model = Own(None, (4, 3, 3, 3), 4).eval()
    batchnorm_mode(model, train=True)
    assert not model.training


# --- Alternating Train and Tune mode ------------------------------------------------------------------------------


class Wide(nn.Module):
    """A batch norm of each sort, one with an activation and dropout of its own."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), BatchNormAct2d(4, drop_layer=nn.Dropout)
        self.conv2, self.norm2 = nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4, momentum=None)
        self.drop = nn.Dropout(0.3)
        self.linear, self.norm3 = nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False)

    def forward(self, x):
        x = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.linear(self.drop(x.mean((2, 3)))))


def wide():
    torch.manual_seed(0)
    return prepared(Wide())


def train(model, switch, optimizer, steps=6):
    """A few steps, in turn with batch norms in Train and in Eval mode."""
    optimizer = optimizer(model.parameters())
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        x = data(4, 3, 6, 6, seed=step)
        switch(model, step % 2 == 0)
        optimizer.zero_grad(set_to_none=step % 3 == 0)
        losses.append(model(x).sin().sum())
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


def by_hand(model, train):
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = train


def for_good(model, train):
    batchnorm_mode(model, train)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-3),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
}


@pytest.mark.parametrize(
    ("made", "build", "optimizer"),
    [
        ("tuned", net, "SGD"),
        ("tuned", wide, "AdamW, foreach"),
        ("tuned in train mode", wide, "SGD"),
        ("tuned in eval mode", wide, "SGD"),
        ("transformed", net, "AdamW, foreach"),
        ("transformed", wide, "SGD"),
    ],
)
def test_alternating_train_and_tune_mode(build, made, optimizer):
    original = build().train()
    model = {
        "tuned": lambda m: tune(m, include_training=True),
        "tuned in train mode": lambda m: tune(m.train(), include_training=True),
        "tuned in eval mode": lambda m: tune(m.eval()).train(),
        "transformed": lambda m: transform(convbn_fx.symbolic_trace(m), include_training=True),
    }[made](copy.deepcopy(original))
    assert len(report(model).fused) >= 3
    expected = train(original, by_hand, OPTIMIZERS[optimizer])
    actual = train(model, for_good, OPTIMIZERS[optimizer])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(model.state_dict()), dict(original.state_dict()), rtol=1e-9, atol=1e-9)
    tracked = [m.num_batches_tracked.item() for m in model.modules() if isinstance(m, _BatchNorm)]
    assert set(tracked) <= {0, 3}
    assert 3 in tracked


def test_alternating_saves_memory_in_tune_mode_only():
    original = net().train()
    tuned = tune(original, include_training=True)
    assert saved_bytes(tuned, X) == saved_bytes(original, X)
    batchnorm_mode(tuned)
    batchnorm_mode(original)
    assert saved_bytes(tuned, X) < saved_bytes(original, X)


def test_alternating_inside_a_context():
    original = net().train()
    tuned = tune(copy.deepcopy(original), include_training=True)
    for model in (original, tuned):
        batchnorm_mode(model, train=False)
    for step in range(3):
        x = data(4, 3, 6, 6, seed=step)
        with batchnorm_mode(tuned, train=True, modules=["block"]):
            torch.manual_seed(step)
            actual = tuned(x)
        by_hand(original.block, True)
        torch.manual_seed(step)
        expected = original(x)
        by_hand(original, False)
        torch.testing.assert_close(actual, expected)
        assert_equivalent(original, tuned, x)
    assert tuned.stem.norm.num_batches_tracked == 0
    assert tuned.block.first.norm.num_batches_tracked == 3


# --- norm_eval ----------------------------------------------------------------------------------------------------

COPIES = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": through_pickle,
    "tuned again": tune,
    "twice": lambda m: copy.deepcopy(through_pickle(m)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("training", [False, True], ids=["from eval", "from train"])
def test_batch_norms_stay_in_eval_mode(copied, training):
    model = net().train(training)
    before = snapshot(model)
    tuned = COPIES[copied](tune(model, norm_eval=True))
    assert snapshot(model) == before
    assert len(report(tuned).fused) == 4
    for mode in (True, False, True):
        assert tuned.train(mode) is tuned
        assert modes(tuned) == {name: mode and name not in NORMS for name in modes(model)}
    assert_equivalent(frozen_by_hand(model.train()), tuned, X)
    assert saved_bytes(tuned, X) < saved_bytes(model, X)


def test_statistics_stay():
    tuned = tune(net(), norm_eval=True).train()
    before = copy.deepcopy(dict(tuned.named_buffers()))
    tuned(X)
    torch.testing.assert_close(dict(tuned.named_buffers()), before, rtol=0, atol=0)


def test_train_called_on_a_part():
    tuned = tune(net(), norm_eval=True)
    tuned.block.train()
    assert in_train_mode(tuned) >= {"block", "block.first.conv"}
    assert NORMS.isdisjoint(in_train_mode(tuned))
    tuned.stem.norm.train()
    assert not tuned.stem.norm.training


def test_the_mode_that_a_model_had_is_that_of_everything_else():
    tuned = tune(net().train(), norm_eval=True)
    assert tuned.training
    assert tuned.dropout.training
    assert NORMS.isdisjoint(in_train_mode(tuned))


def test_children_of_a_batch_norm_follow():
    model = wide()
    tuned = tune(model, norm_eval=True).train()
    assert not tuned.norm1.training
    assert tuned.norm1.drop.training
    assert tuned.norm1.act.training
    model.train()
    by_hand(model, False)
    assert_equivalent(model, tuned, X)


def test_only_those_in_the_named_modules():
    tuned = tune(net().train(), modules=["block"], norm_eval=True)
    tuned.train()
    assert in_train_mode(tuned) & NORMS == {"stem.norm", "unused.1"}


def test_batch_norms_that_follow_no_convolution():
    model = prepared(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1))).train()
    tuned = tune(model, norm_eval=True).train()
    assert in_train_mode(tuned) == {"", "1", "2"}


def test_batchnorm_mode_overrides():
    tuned = tune(net(), norm_eval=True).train()
    with batchnorm_mode(tuned, train=True):
        assert in_train_mode(tuned) >= NORMS
        tuned(X)
    assert NORMS.isdisjoint(in_train_mode(tuned))
    assert tuned.stem.norm.num_batches_tracked == 1
    batchnorm_mode(tuned, train=True, modules=["stem"])
    assert in_train_mode(tuned) & NORMS == {"stem.norm"}
    tuned.train()
    assert NORMS.isdisjoint(in_train_mode(tuned))


def test_batchnorm_mode_overrides_in_a_copy():
    tuned = through_pickle(tune(net(), norm_eval=True))
    batchnorm_mode(tuned, train=True)
    assert in_train_mode(tuned) == NORMS


def test_deployed():
    model = net()
    deployed = convbn_fx.deploy(tune(model, norm_eval=True).train())
    assert len(report(deployed).fused) == 4
    torch.testing.assert_close(deployed.eval()(X), model(X))


def test_a_graph_module_inside():
    torch.manual_seed(0)
    part = prepared(Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    tuned = tune(nn.Sequential(torch.fx.symbolic_trace(part), nn.Dropout()).train(), norm_eval=True).train()
    assert in_train_mode(tuned) == {"", "0", "0.conv", "1"}
    assert len(report(tuned).fused) == 1
