"""deploy: what picks a convolution is not seen by an exploration, in one of many ways, by one of many values."""

import itertools
import linecache
import operator  # noqa: F401 - sources use it
import random

import pytest
import torch
from models import data, prepared, reasons
from torch import nn  # noqa: F401 - sources use it

from convbn_fx import deploy


def pick(index, convs):
    return convs[index]


def pick_by_branch(index, convs):
    if index == 0:
        return convs[0]
    return convs[1]


def by_kind(kind, model):
    if kind == "conv":
        return model.conv0
    return model.conv1


def by_name(name, model):
    return getattr(model, name)


class Picker:
    def __init__(self, model):
        self.model = model

    def __call__(self, i):
        return getattr(self.model, ("conv0", "conv1")[i])


#: Ways of picking one of two convolutions by the number i.
PICKED = {
    "a tuple": "(self.conv0, self.conv1)[i]",
    "a list of modules": "self.convs[i]",
    "a dictionary": "dict(a=self.conv0, b=self.conv1)['ab'[i]]",
    "a helper": "pick(i, [self.conv0, self.conv1])",
    "a helper that branches": "pick_by_branch(i, self.convs)",
    "a helper by kind": "by_kind('conv' if i == 0 else 'other', self)",
    "a helper by name": "by_name(f'conv{i}', self)",
    "an object": "Picker(self)(i)",
    "a formatted name": "getattr(self, f'conv{i}')",
    "a name by percent": "getattr(self, 'conv%d' % i)",
    "a name by plus": "getattr(self, 'conv' + str(i))",
    "a name by format": "getattr(self, 'conv{}'.format(i))",
    "a name by default": "getattr(self, f'conv{i}', None)",
    "attrgetter": "operator.attrgetter(f'conv{i}')(self)",
    "_modules": "self._modules[f'conv{i}']",
    "get_submodule": "self.get_submodule(f'conv{i}')",
    "children": "list(self.children())[i]",
    "a comprehension": "[conv for j, conv in enumerate(self.convs) if j == i][0]",
    "one line": "(self.conv1 if i else self.conv0)",
    "a lambda": "(lambda j: getattr(self, f'conv{j}'))(i)",
}

#: What an exploration sees no number in.
NUMBERS = {
    "nothing": "0",
    "keywords": "kwargs.get('which', 0)",
    "whether there is a keyword": "int('which' in kwargs)",
    "how many keywords": "len(kwargs)",
    "how many arguments": "len(args)",
    "an option": "int(option)",
    "grad mode": "int(torch.is_grad_enabled())",
    "a dtype": "int(x.dtype is torch.float32)",
    "a table of dtypes": "{torch.float64: 0, torch.float32: 1}.get(x.dtype, 0)",
    "the name of a dtype": "{'torch.float32': 1}.get(str(x.dtype), 0)",
    "the text of a size": "{'3': 1}.get(f'{x.shape[0]}', 0)",
    "a table of sizes": "{2: 0, 3: 1}.get(x.shape[0], 0)",
    "a set of sizes": "int(x.shape[0] in {3})",
    "a class": "int(isinstance(option, str))",
    "Python's random numbers": "random.randrange(2)",
    "PyTorch's random numbers": "int(torch.randint(2, ()))",
    "what it counts": "self.counted()",
    "Train mode": "int(self.training)",
}

#: What is done with the convolution that was picked.
USED = {
    "normalised": "self.norm(picked(x))",
    "alone": "self.norm(self.conv0(x)) + picked(x)",
}

SOURCE = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0, self.conv1, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.convs = nn.ModuleList([self.conv0, self.conv1])
        self.count = 0

    def counted(self):
        self.count += 1
        return self.count % 2

    def forward(self, x, *args, option=0, **kwargs):
        i = {number}
        picked = {picked}
        return {used}
"""


def model_of(picked, number, used):
    source = SOURCE.replace("{number}", NUMBERS[number]).replace("{picked}", PICKED[picked])
    source = source.replace("{used}", USED[used])
    name = f"<{picked}, {number}, {used}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = dict(globals())
    exec(compile(source, name, "exec"), namespace)
    torch.manual_seed(0)
    return prepared(namespace["Model"]())


def outputs_of(model):
    """What users may call it with, in which mode."""
    calls = {
        "plainly": model,
        "a keyword": lambda x: model(x, which=1),
        "an option": lambda x: model(x, option=1),
        "a text": lambda x: model(x, option=""),
        "an argument": lambda x: model(x, 1),
        "again": model,
        "no gradients": torch.no_grad()(model.forward),
    }
    found = {}
    for seed in range(3):
        for name, call in calls.items():
            random.seed(seed)
            torch.manual_seed(seed)
            try:
                found[seed, name] = call(data(2 + seed // 2, 3, 5, 5))
            except (TypeError, ValueError) as error:  # int("")
                found[seed, name] = type(error)
    model.training = True
    found["training"] = model(data(2, 3, 5, 5))
    model.eval().float()
    found["float32"] = model(data(2, 3, 5, 5).float()).double()
    return found


def check(picked, number, used):
    expected = outputs_of(model_of(picked, number, used))
    model = model_of(picked, number, used)
    for name, value in outputs_of(deploy(model)).items():
        if isinstance(value, type):
            assert value is expected[name]
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=str(name))


def is_quick(picked, number, used):
    return (number == "keywords" and used == "normalised") or picked == "a formatted name"


CASES = [
    pytest.param(*case, id=", ".join(case), marks=() if is_quick(*case) else pytest.mark.slow)
    for case in itertools.product(PICKED, NUMBERS, USED)
]


@pytest.mark.parametrize(("picked", "number", "used"), CASES)
def test_a_convolution_that_is_picked(picked, number, used):
    check(picked, number, used)


def test_every_number_picks_another_convolution_in_some_call():
    """Else nothing could fail."""
    always_the_first = outputs_of(model_of("a tuple", "nothing", "normalised"))
    for number in NUMBERS.keys() - {"nothing"}:
        outputs = outputs_of(model_of("a tuple", number, "normalised"))
        tensors = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        assert not all(
            torch.allclose(value, always_the_first[name], atol=1e-3) for name, value in tensors.items()
        ), number


#: Forwards whose questions change nothing but tensors, or nothing at all: their pair is baked.
HARMLESS = {
    "a message": 'assert x.shape[0] > 0, f"got {x.shape}"\n        return self.norm(self.conv0(x))',
    "a printed size": "print(f'{x.shape}')\n        return self.norm(self.conv0(x))",
    "an error": (
        "if x.dtype is torch.int64:\n            raise TypeError(str(x))\n        return self.norm(self.conv0(x))"
    ),
    "whether an attribute is True": (
        "skip = getattr(self.norm, 'inplace', False) is True\n        return self.norm(self.conv0(x)) * (1 + skip)"
    ),
    "an argument handed on": "return self.inner(x, *args, **kwargs)",
    "a list that is unpacked": (
        "if isinstance(x, list):\n            x = x[0]\n        return self.norm(self.conv0(x))"
    ),
    "an attribute in a variable": (
        "y, act = self.norm(self.conv0(x)), getattr(self, 'act', None)\n"
        "        return y if act is None else act(y)"
    ),
    "an activation on the other way": (
        "y = self.norm(self.conv0(x))\n        if isinstance(option, str):\n            y = y.relu()\n        return y"
    ),
}


@pytest.mark.parametrize("question", HARMLESS)
def test_a_question_that_decides_on_no_module(question):
    source = SOURCE[: SOURCE.index("        i = {number}")] + f"        {HARMLESS[question]}\n"
    source += "\n    def inner(self, x, option=0):\n        return self.norm(self.conv0(x))\n"
    namespace = dict(globals())
    exec(compile(source, question, "exec"), namespace)
    model = prepared(namespace["Model"]())
    assert reasons(deploy(model)) == {}
    torch.testing.assert_close(deploy(model)(data(2, 3, 5, 5)), model(data(2, 3, 5, 5)))


FALLING_BACK = """
class Falling(Model):
    def forward(self, x):
        try:
            return self.norm(self.conv0(x))
        except RuntimeError:
            return self.conv0(x[:, :3])
"""


def test_what_is_done_where_something_raises():
    namespace = dict(globals())
    exec(SOURCE.replace("{number}", "0").replace("{picked}", "0").replace("{used}", "0"), namespace)
    exec(FALLING_BACK, namespace)
    model = prepared(namespace["Falling"]())
    deployed = deploy(model)
    for channels in (3, 4):
        x = data(2, channels, 5, 5)
        torch.testing.assert_close(deployed(x), model(x))
