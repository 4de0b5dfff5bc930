"""What is used more than once, on whichever path, is baked only where all of its uses agree."""

import pytest
import torch
from blocks import ConvLast, NormFirst
from deployed import SharedNorm, SharedWithoutNorm, assert_same, deployed_with, norms_in, two_convs
from models import ConvNormAct, Pair, data, pair, prepared, reasons
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from convbn_fx import deploy, report, tune

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning")


# --- Sharing ------------------------------------------------------------------------------------------------------


def test_a_convolution_with_two_batch_norms():
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm2(self.conv(x.sin())))
    deployed = deployed_with(model, 2)
    assert not norms_in(deployed)
    assert type(deployed.conv) is nn.Identity
    assert (type(deployed.norm), type(deployed.norm2)) == (nn.Conv2d, nn.Conv2d)
    assert_same(model, deployed, X)


def test_a_convolution_with_two_batch_norms_that_have_activations():
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm2(self.conv(x.sin())))
    model.norm, model.norm2 = BatchNormAct2d(3), BatchNormAct2d(3, act_layer=nn.SiLU)
    prepared(model)
    assert_same(model, deployed_with(model, 2), X)


@pytest.mark.parametrize("conv", [nn.Conv1d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1), nn.Linear(2, 2)], ids=repr)
def test_a_convolution_with_two_batch_norms_looks_at_ranks(conv):
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm2(self.conv(x.sin())))
    model.conv, model.norm, model.norm2 = conv, nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    prepared(model)
    shape = (4, 2) if isinstance(conv, nn.Linear) else (4, 2, 2)
    deployed = deploy(model)
    assert_same(model, deployed, data(*shape))
    if report(deployed).fused:
        with pytest.raises(ValueError, match="dimensions"):
            deployed(data(4, 2, 2) if isinstance(conv, nn.Linear) else data(2, 2))


def test_one_output_into_two_batch_norms():
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) * self.norm2(y)

    model = two_convs(forward)
    assert_same(model, deploy(model), X)


def test_a_batch_norm_after_two_convolutions():
    model = two_convs(lambda self, x: self.norm(self.conv(x)) * self.norm(self.conv2(x.sin())))
    deployed = deployed_with(model, 2)
    assert reasons(deployed) == {"norm2": "NOT_CALLED"}
    assert type(deployed.norm) is nn.Identity
    assert_same(model, deployed, X)


def test_a_pair_used_twice():
    model = two_convs(lambda self, x: self.norm(self.conv(self.norm(self.conv(x)))))
    assert_same(model, deployed_with(model, 1), X)


def test_mixed_sharing():
    model = two_convs(
        lambda self, x: self.norm(self.conv(x)) + self.norm2(self.conv(x)) + self.norm(self.conv2(x))
    )
    deployed = deployed_with(model, 0)
    assert set(reasons(deployed).values()) == {"SHARED"}
    assert_same(model, deployed, X)


def test_a_transposed_convolution_with_two_batch_norms():
    def forward(self, x):
        return self.norm(self.conv(x, [13, 13])) + self.norm2(self.conv(x.sin(), [13, 13]))

    model = two_convs(forward)
    model.conv = nn.ConvTranspose2d(3, 3, 3, stride=2).double()
    assert_same(model, deploy(model), X)


def test_a_convolution_shared_by_blocks():
    first, second = ConvNormAct(3, 3), ConvNormAct(3, 3)
    second.conv = first.conv
    model = prepared(nn.Sequential(first, second))
    assert_same(model, deployed_with(model, 2), X)


@pytest.mark.parametrize("shared", ["conv", "norm"])
def test_only_one_of_two_blocks_that_share_a_module_is_selected(shared):
    """What is folded for the one must not be folded for the other."""
    first, second = ConvNormAct(3, 3), ConvNormAct(3, 3)
    setattr(second, shared, getattr(first, shared))
    model = prepared(nn.Sequential(first, second))
    assert_same(model, deploy(model, modules=["0"]), X)
    assert_same(model, deploy(model, modules=["1"]), X)


def test_a_shared_block():
    block = ConvNormAct(3, 3)
    model = prepared(nn.Sequential(block, nn.Conv2d(3, 3, 1), block))
    deployed = deployed_with(model, 1)
    assert deployed[0] is deployed[2]
    assert_same(model, deployed, X)


def test_tied_weights():
    model = two_convs(lambda self, x: self.norm2(self.conv2(self.norm(self.conv(x)))))
    model.conv2.weight = model.conv.weight
    assert_same(model, deployed_with(model, 2), X)


# --- Other uses of a convolution's output -------------------------------------------------------------------------


class Optional(Pair):
    """Uses the output of its convolution elsewhere if it is asked to."""

    def forward(self, x, extra=None, flag=False):
        y = self.conv(x)
        z = self.norm(y)
        if extra is not None:
            z = z + y * extra
        return z + y if flag else z


def test_an_optional_path():
    torch.manual_seed(0)
    model = prepared(Optional())
    deployed = deployed_with(model, 0)
    assert reasons(deployed) == {"norm": "CONVOLUTION_OUTPUT_USED_ELSEWHERE"}
    assert_same(model, deployed, X)
    assert_same(model, deployed, X, data(2, 4, 4, 4))
    assert_same(model, deployed, X, flag=True)


class OneOfTwoOptions(Pair):
    def forward(self, x, first=None, second=None):
        y = self.conv(x)
        if first is not None and second is None:
            return y * first
        return self.norm(y)


def test_an_optional_path_for_one_of_two_arguments():
    torch.manual_seed(0)
    model = prepared(OneOfTwoOptions())
    deployed = deploy(model)
    factor = data(2, 4, 4, 4)
    assert_same(model, deployed, X)
    assert_same(model, deployed, X, factor, factor)
    assert_same(model, deployed, X, factor)


class ByName(Pair):
    """Chooses by a string."""

    def forward(self, x, kind="normalised"):
        y = self.conv(x)
        return {"normalised": lambda: self.norm(y), "raw": lambda: y}[kind]()


class ByMatch(Pair):
    def forward(self, x, kind="normalised"):
        y = self.conv(x)
        match kind:
            case "raw":
                return y
            case _:
                return self.norm(y)


@pytest.mark.parametrize(
    ("cls", "argument"),
    [(ByName, "raw"), (ByMatch, "raw")],
    ids=["a key", "a match"],
)
def test_an_option_that_is_no_tensor(cls, argument):
    torch.manual_seed(0)
    model = prepared(cls())
    deployed = deploy(model)
    assert_same(model, deployed, X)
    torch.testing.assert_close(deployed(X, argument), model(X, argument))


class ManyBranches(Pair):
    """More decisions than are looked at one by one; the last of them reads the convolution's output."""

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        for index in range(40):
            if x.flatten()[index] > 100:
                z = z + index
        return z if x.mean() > 100 else z * 2 + y


def test_a_decision_after_many():
    torch.manual_seed(0)
    model = prepared(ManyBranches())
    deployed = deploy(model)
    assert_same(model, deployed, X)


#: What an exploration cannot do with something that stands for a tensor.
OBSTACLES = {
    "numpy": lambda x: x.detach().numpy().sum(),
    "a dictionary": lambda x: {6: 1.0}[x.shape[-1]],
    "a Python number": lambda x: round(x.mean().item(), 3),
    "an assertion": lambda x: [x.shape == (2, 3, 6, 6)].index(True),
    "a list": lambda x: min(x.flatten().tolist()),
    "an exact type": lambda x: {torch.Tensor: 1.0}[type(x)],
}


@pytest.mark.parametrize("which", ["conv", "norm"])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_use_behind_what_cannot_be_explored(obstacle, which):
    """What was not seen may be anything: a forward that could not be followed to its end proves nothing."""

    def forward(self, x):
        z = self.norm(self.conv(x))
        z = z + OBSTACLES[obstacle](x)
        return z * self.conv(x.cos()) if which == "conv" else self.norm(z)

    model = pair(forward)
    assert_same(model, deploy(model), X)


def test_a_use_in_train_mode_only():
    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return (z, y) if self.training else z

    class Auxiliary(Pair):
        pass

    Auxiliary.forward = forward
    model = prepared(Auxiliary())
    deployed = deploy(model)
    assert_same(model, deployed, X)
    for m in (model, deployed):
        m.training = True
    assert_same(model, deployed, X)


#: Forwards in which one of the two is used apart from the pair as well.
USES = {
    "conv returned": lambda self, x: (self.norm(self.conv(x)), self.conv(x)),
    "conv returned first": lambda self, x: (self.conv(x), self.norm(self.conv(x.sin()))),
    "conv in a dict": lambda self, x: {"z": self.norm(self.conv(x)), "y": self.conv(x.sin())},
    "output returned": lambda self, x: (y := self.conv(x), self.norm(y)),
    "conv added": lambda self, x: self.norm(self.conv(x)) + self.conv(x).sin(),
    "norm of the input": lambda self, x: self.norm(self.conv(x)) + self.norm(x),
    "norm of the input returned": lambda self, x: (self.norm(x), self.norm(self.conv(x))),
    "norm of a sine": lambda self, x: self.norm(self.conv(x)) + self.norm(x.sin()),
    "conv and another norm": lambda self, x: self.norm(self.conv(x)) + F.instance_norm(self.conv(x)),
    "functional norm of the same conv": lambda self, x: (
        self.norm(self.conv(x)) + F.batch_norm(self.conv(x), self.norm2.running_mean, self.norm2.running_var)
    ),
    "functional conv before the same norm": lambda self, x: (
        self.norm(self.conv(x)) + self.norm(F.conv2d(x, self.conv2.weight, padding=1))
    ),
    "forward called": lambda self, x: self.norm(self.conv(x)) + self.conv.forward(x),
    "forward of the norm called": lambda self, x: self.norm(self.conv(x)) + self.norm.forward(x),
    "in a list": lambda self, x: torch.stack([self.norm(self.conv(x)), *map(self.conv, [x])]),
    "shape": lambda self, x: self.norm(y := self.conv(x)) * y.shape[0],
    "in place": lambda self, x: self.norm(self.conv(x).add_(1)),
    "recursively": lambda self, x: self.norm(self.conv(self.conv(x))),
    "norm twice": lambda self, x: self.norm(self.norm(self.conv(x))),
}


@pytest.mark.parametrize("source", ["model", "tuned", "graph"])
@pytest.mark.parametrize("use", USES)
def test_used_apart_from_its_pair_as_well(use, source):
    model = two_convs(USES[use])
    if "graph" in source and use == "forward of the norm called":
        pytest.skip("no trace goes through it")
    made = {
        "model": lambda m: m,
        "tuned": tune,
        "graph": torch.fx.symbolic_trace,
    }[source](model)
    assert_same(model, deploy(made), X)


class SharedBlock(nn.Module):
    """A block that ends in a convolution, used before a batch norm by one part and by itself in another."""

    def __init__(self):
        super().__init__()
        self.block = ConvLast()
        self.first = nn.Sequential(self.block, NormFirst())
        self.second = nn.Sequential(self.block, nn.ReLU())

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("cls", [SharedWithoutNorm, SharedNorm, SharedBlock])
def test_a_module_that_another_block_uses_apart(cls):
    torch.manual_seed(0)
    model = prepared(cls())
    assert_same(model, deploy(model), X)


# --- Parameters that a forward reads ------------------------------------------------------------------------------


READERS = {
    "weight": lambda self, x: self.norm(self.conv(x)) + self.conv.weight.sum(),
    "weight first": lambda self, x: self.norm(self.conv(x + self.conv.weight.mean())),
    "tied decoder": lambda self, x: F.conv_transpose2d(self.norm(self.conv(x)), self.conv.weight),
    "bias": lambda self, x: self.norm(self.conv(x)) - self.conv.bias.view(1, -1, 1, 1),
    "whether there is a bias": lambda self, x: (
        self.norm(self.conv(x)) * (1 if self.conv2.bias is None else 2)
    ),
    "gamma": lambda self, x: self.norm(self.conv(x)) * self.norm.weight.sum(),
    "statistics": lambda self, x: self.norm(self.conv(x)) + self.norm.running_mean.view(1, -1, 1, 1),
    "eps": lambda self, x: self.norm(self.conv(x)) + self.norm.eps,
    "channels": lambda self, x: self.norm(self.conv(x)) * self.norm.num_features,
    "dtype": lambda self, x: self.norm(self.conv(x.to(self.norm.weight.dtype))),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_forward_that_reads_what_is_folded(reader):
    model = two_convs(READERS[reader])
    assert_same(model, deploy(model), X)


def test_a_parent_that_reads_the_weight_of_a_child():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = ConvNormAct(3, 3)

        def forward(self, x):
            return self.child(x) + self.child.conv.weight.square().sum()

    torch.manual_seed(0)
    model = prepared(Parent())
    assert_same(model, deploy(model), X)


# --- Loops whose length is not known ------------------------------------------------------------------------------


class SharedHead(nn.Module):
    """One convolution for all levels of a pyramid, and a batch norm for each."""

    def __init__(self, levels, order):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(levels))
        self.order = order

    def forward(self, features):
        return [norm(self.conv(level)) for norm, level in self.order(self.norms, features)]


ORDERS = {
    "zip": zip,
    "zip, features first": lambda norms, features: (
        (norm, level) for level, norm in zip(features, norms, strict=True)
    ),
    "enumerate": lambda norms, features: ((norms[i], level) for i, level in enumerate(features)),
    "range": lambda norms, features: ((norms[i], features[i]) for i in range(len(features))),
}


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_a_shared_convolution_whose_batch_norms_a_loop_calls(order, levels):
    model = prepared(SharedHead(levels, ORDERS[order]))
    features = [data(2, 4, 8 - level, 8) for level in range(levels)]
    for changed in (deploy(model), tune(model)):
        torch.testing.assert_close(changed(features), model(features))


def test_the_time_of_a_sequence_chooses_the_batch_norm():
    class Recurrent(SharedHead):
        def forward(self, x):
            return torch.stack([self.norms[t](self.conv(x[:, t])) for t in range(x.shape[1])])

    model, x = prepared(Recurrent(3, None)), data(2, 3, 4, 6, 6)
    torch.testing.assert_close(deploy(model)(x), model(x))
