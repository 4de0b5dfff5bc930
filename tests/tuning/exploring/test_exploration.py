"""What exploring a forward finds, and what it says where it cannot: tune, deploy and the reasons in their reports."""

import logging
import subprocess
import sys
import threading
import time

import pytest
import torch
from models import data, prepared, reasons, tuned_with
from torch import Tensor, nn
from torch.nn import functional as F

from convbn_fx import SkipReason, deploy, report, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent
from convbn_fx.tuning.exploring import exploration

X = data(2, 3, 6, 6)


class Net(nn.Module):
    """A pair, another pair, and a forward that is given."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.function = forward

    def forward(self, x, *more):
        return self.function(self, x, *more)


def built(forward):
    """The forward as that of a class of its own."""
    return prepared(type("Built", (Net,), {"forward": forward})(None))


# --- Classes ------------------------------------------------------------------------------------------------------


def only_tensors(m, x):
    if isinstance(x, Tensor):
        return m.norm2(m.conv2(m.norm(m.conv(x))))
    return None


def asserted(m, x):
    assert isinstance(x, Tensor), "a tensor, please"
    return m.norm2(m.conv2(m.norm(m.conv(x))))


def nothing_but_tensors(m, x):
    if not torch.is_tensor(x):
        raise TypeError(type(x).__name__)
    return m.norm2(m.conv2(m.norm(m.conv(x))))


def another_pair_for_lists(m, x):
    if isinstance(x, Tensor):
        return m.norm(m.conv(x))
    return m.norm2(m.conv2(torch.cat([x[0], x[1][:, :1]], 1)))


def the_output_is_a_tensor(m, x):
    y = m.conv(x)
    assert isinstance(y, Tensor)
    return m.norm2(m.conv2(m.norm(y))) if torch.is_tensor(y) else y


def sizes_are_numbers(m, x):
    assert isinstance(x.shape, tuple)
    assert isinstance(x.size(0), int)
    assert isinstance(x.shape[-1], int)
    assert isinstance(x.size()[2:], torch.Size)
    return m.norm2(m.conv2(m.norm(m.conv(x))))


@pytest.mark.parametrize(
    "forward",
    [only_tensors, asserted, nothing_but_tensors, the_output_is_a_tensor, sizes_are_numbers],
    ids=lambda forward: forward.__name__,
)
def test_a_forward_that_asks_for_classes(forward):
    model = built(forward)
    for _ in range(8):  # Python specialises the instructions of what runs often
        tuned = tuned_with(model, 2)
    assert_equivalent(model, tuned, X)
    assert saved_bytes(tuned, X) < saved_bytes(model, X)
    assert len(report(deploy(model)).fused) == 2


def numbers_given_to_functions(m, x):
    y = m.norm(m.conv(x))
    b, c, h, w = y.shape
    offsets = torch.as_tensor([0, *(size for size in (b, c))]).cumsum_(0)
    y = F.pad(y, (m.conv.weight.shape[-1] // 3,) * 4) + torch.zeros((b, c, 1, 1), dtype=y.dtype)
    y = F.interpolate(y, size=(h, w)) + torch.arange(h * 1.0, dtype=y.dtype)[: x.size(3)] * offsets[0]
    y = torch.ones((b, h), dtype=y.dtype)[:, None, :, None] * torch.full((), b, dtype=y.dtype) * y
    return m.norm2(F.conv2d(y, m.conv2.weight, m.conv2.bias, padding=m.conv.weight.shape[-1] // 2))


def test_functions_in_cpp_take_no_guess_for_a_tensor():
    model = built(numbers_given_to_functions)  # a segmentation fault, if they do
    tuned = tune(model)
    assert [skip.detail for skip in report(tuned).skipped if skip.reason is SkipReason.NOT_FOLLOWED] == []
    assert_equivalent(model, tuned, X)


def test_both_answers_are_followed():
    model = built(another_pair_for_lists)
    tuned = tuned_with(model, 2)
    assert_equivalent(model, tuned, X)
    assert_equivalent(model, tuned, [X, X])


class Encoder(nn.Module):
    """As those of transformers: an argument is asked for after each of many blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(12))
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, keep=False):
        kept = []
        for block in self.blocks:
            x = block(x)
            if keep:
                kept.append(x)
        return self.norm(self.conv(x)), kept


def test_an_argument_has_one_answer_all_along():
    model = prepared(Encoder())
    assert len(report(deploy(model)).fused) == 1  # which needs every way
    for keep in (False, True):
        assert_equivalent(model, tuned_with(model, 1), X, keep)


def test_an_argument_that_is_changed_in_place_may_have_another():
    def forward(m, x, flag=False):
        if flag:
            flag.zero_()
            if not flag:
                return m.conv(x)
        return m.norm(m.conv(x))

    model = built(forward)
    flag = torch.ones(())
    torch.testing.assert_close(deploy(model)(X, flag.clone()), model(X, flag.clone()))


# --- Numbers ------------------------------------------------------------------------------------------------------


def sizes(m, x):
    b, c, h, w = x.size()
    return m.norm2(m.conv2(m.norm(m.conv(x.view(b, c, h, w)))))


def shape_of_the_output(m, x):
    y = m.norm(m.conv(x))
    b, c, *_ = y.shape
    return m.norm2(m.conv2(y.view(b, c, *y.size()[2:])))


def numbers_of_the_shape(m, x):
    y = m.norm(m.conv(x))
    b, c, h, w = (int(size) for size in y.shape)
    return m.norm2(m.conv2(y.view(b, c, h, w)))


def three_parts(m, x):
    one, two, three = x.chunk(3, 1)
    y = m.norm(m.conv(torch.cat([two, three, one], 1)))
    one, two, *more = y.split(1, 1)
    _, _, *_ = one.unbind(2)
    return m.norm2(m.conv2(torch.cat([one, two, *more], 1)))


def rounded(m, x):
    half = round(x.shape[0] / 2)
    m.said = f"{x.mean():.2f}, {half:2d}"
    return m.norm2(m.conv2(m.norm(m.conv(x)) * half))


@pytest.mark.parametrize(
    "forward",
    [sizes, shape_of_the_output, numbers_of_the_shape, three_parts, rounded],
    ids=lambda forward: forward.__name__,
)
def test_a_forward_that_needs_numbers(forward):
    model = built(forward)
    tuned = tuned_with(model, 2)
    assert_equivalent(model, tuned, X)


def shape_before_the_norm(m, x):
    y = m.conv(x)
    b, c, *_ = y.shape
    assert y.dtype == x.dtype
    assert y.device == x.device
    assert (y.size(1), y.dim()) == (c, y.ndim)
    return m.norm2(m.conv2(m.norm(y))) / (b * y.numel())


def test_the_shape_of_what_waits_is_known():
    model, same = built(shape_before_the_norm), built(asserted)
    tuned = tuned_with(model, 2)
    assert_equivalent(model, tuned, X)
    assert saved_bytes(tuned, X) == saved_bytes(tuned_with(same, 2), X)


# --- Reasons ------------------------------------------------------------------------------------------------------


def breaks_off(m, x):
    y = m.norm(m.conv(x))
    return m.norm2(m.conv2(y * {6: 1.0}[x.shape[-1]]))


def test_where_a_forward_breaks_off_is_said():
    (skip,) = report(tune(nn.Sequential(built(breaks_off)))).skipped
    assert (skip.batch_norm, skip.reason) == ("0.norm2", SkipReason.NOT_FOLLOWED)
    line = breaks_off.__code__.co_firstlineno + 2
    assert skip.detail.startswith(f"0: breaks_off, {__file__}:{line}: KeyError: ")
    model = built(breaks_off)
    assert_equivalent(model, tune(model), X)
    torch.testing.assert_close(deploy(model)(X), model(X))


def a_loop_that_is_longer(m, x):
    y = m.norm(m.conv(x))
    for i in range(x.shape[0]):
        y = y if i == 0 else m.norm2(m.conv2(y))
    return y


def test_a_guess_is_not_taken_for_knowledge():
    model = built(a_loop_that_is_longer)
    tuned = tuned_with(model, 1)
    assert reasons(tuned) == {"norm2": "NOT_FOLLOWED"}
    assert "how often a loop runs" in report(tuned).skipped[0].detail
    assert_equivalent(model, tuned, X)


def test_what_is_called_from_elsewhere():
    model = built(lambda m, x: m.outside[0](m.norm(m.conv(x))))
    kept = nn.ModuleList([prepared(nn.BatchNorm2d(4))])
    model.outside = [kept[0]]
    assert reasons(tune(nn.ModuleList([model, kept]))) == {"0.norm2": "NOT_CALLED", "1.0": "NOT_FOLLOWED"}


def counting_to(m, x, end):
    y = m.norm(m.conv(x))
    count = int(x.sum())
    while count < end:
        try:
            count += 1
        except ArithmeticError:
            count = 0
    return m.norm2(m.conv2(y))


def test_an_exploration_that_does_not_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(exploration, "_SECONDS", 0.3)
    model = built(lambda m, x: counting_to(m, x, 10**15))
    begun = time.monotonic()
    tuned = tuned_with(model, 1)
    assert time.monotonic() - begun < 20
    assert reasons(tuned) == {"norm2": "NOT_FOLLOWED"}
    assert "it has not ended after 0.3 seconds" in report(tuned).skipped[0].detail
    x = X.abs() * 1e14
    torch.testing.assert_close(tuned(x), model(x))
    assert len(report(tune(built(asserted))).fused) == 2


THEN_TRACED = """
import sys
from convbn_fx.tuning.exploring.time_limit import OutOfTime, within

def endless():
    while True:
        pass

for _ in range(20):
    try:
        within(0.01, endless)
    except OutOfTime:
        sys.settrace(lambda *event: None)
        exec("def traced(): pass\\ntraced()")
        sys.settrace(None)
print("ended")
"""


def test_a_debugger_goes_on_after_an_exploration_was_cut_off():
    """What is traced never ends where CPython waits for an exception that never comes."""
    done = subprocess.run(
        [sys.executable, "-c", THEN_TRACED], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.stderr) == ("ended\n", "")


def say(text):
    sys.stdout.write(text)
    sys.stderr.write(text)
    logging.getLogger("talkative").error(text)


def talkative(m, x):
    say("here")
    other = threading.Thread(target=say, args=("there",))
    other.start()
    other.join()
    return m.norm2(m.conv2(m.norm(m.conv(x))))


def test_what_a_forward_prints_while_it_is_explored_is_swallowed(capsys, caplog):
    model, streams = built(talkative), (sys.stdout, sys.stderr, logging.Logger.handle)
    tuned = tuned_with(model, 2)
    said = [*capsys.readouterr(), *(record.message for record in caplog.records)]
    assert "there" in said[0]
    assert not any("here" in text.replace("there", "") for text in said)
    assert streams == (sys.stdout, sys.stderr, logging.Logger.handle)
    tuned(X)
    assert "herethere" in capsys.readouterr().out


def test_what_no_way_calls():
    assert reasons(tune(built(lambda m, x: m.norm(m.conv(x))))) == {"norm2": "NOT_CALLED"}


# --- Names and classes of modules ---------------------------------------------------------------------------------


class UnderTwoNames(nn.Module):
    """As the blocks of nnU-Net's networks."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.all_modules = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, x):
        return self.all_modules(x)


class CalledUnderBoth(UnderTwoNames):
    def forward(self, x):
        return self.all_modules(x) + self.norm(self.conv(x))


@pytest.mark.parametrize("cls", [UnderTwoNames, CalledUnderBoth])
def test_a_module_under_two_names_is_one_module(cls):
    model = prepared(cls())
    tuned = tuned_with(model, 1)
    assert report(tuned).skipped == []
    assert_equivalent(model, tuned, X)


class OwnLinear(nn.Module):
    """As torch_geometric's: it derives from no layer of PyTorch's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = (
            nn.Parameter(torch.randn(outputs, inputs)),
            nn.Parameter(torch.randn(outputs)),
        )

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def test_a_class_that_derives_from_no_convolution():
    layers = [OwnLinear(3, 64), nn.BatchNorm1d(64), nn.ReLU(), OwnLinear(64, 64), nn.BatchNorm1d(64)]
    model = prepared(nn.Sequential(*layers))
    tuned = tuned_with(model, 2)
    x = data(90, 3)
    assert_equivalent(model, tuned, x)
    assert saved_bytes(tuned, x) < saved_bytes(model, x)
    torch.testing.assert_close(deploy(model)(x), model(x))


class NamedAsWeAre(Net):
    """Its methods have names that functions of this library have, too, whose first argument is the module."""

    def explore(self, root=None):
        return root

    discover = follow = trace = way = explore

    def forward(self, x):
        return self.norm2(self.conv2(self.norm(self.conv(self.explore(x)))))


def logged(method):
    def wrapper(self, x):
        return method(self, x)

    return wrapper


class Decorated(Net):
    @logged
    def features(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        return self.norm2(self.conv2(self.features(x)))


def test_only_methods_that_run_a_pair_are_wrapped():
    model = prepared(NamedAsWeAre(None))
    tuned = tuned_with(model, 2)
    assert all(getattr(type(tuned), name) is NamedAsWeAre.explore for name in ("explore", "follow", "trace"))
    assert_equivalent(model, tuned, X)


def test_a_decorated_method_that_runs_a_pair():
    model = prepared(Decorated(None))
    tuned = tuned_with(model, 2)
    assert_equivalent(model, tuned, X)
    assert "features" in vars(type(tuned))
    torch.testing.assert_close(tuned.features(X), model.features(X))
