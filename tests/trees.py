"""Random trees of modules that share, hide and inspect one another: what a spec is and writes, and what draws it.

A spec is a list of modules: convolutions, batch norms, activations, and blocks, whose children are earlier modules of
the list. Nothing keeps two blocks from having the same child. A block's forward is a straight-line program, as in
`strategies`. A spec is written out as Python source, so that forwards are what people write, and a failing example is
its own reproduction. All values have the same shape, so that everything fits everywhere.
"""

import linecache
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from strategies import Brief
from torch import Tensor, nn

from convbn_fx.testing import randomize_batchnorms

CHANNELS = 3
SHAPE = (2, CHANNELS, 4, 4)
FLAT_SHAPE = (8, CHANNELS)
LARGEST_COST = 20  # calls of layers in one call of a model


# --- Ways of writing something -----------------------------------------------------------------------------------


class Held(NamedTuple):
    """How a block refers to a child: what its constructor does, what its class has for it, and how it is read."""

    made: str
    read: str
    of_class: str = ""
    is_module: bool = True  # what is read can be asked for its class and its attributes


#: {n} is the name of the reference, {m} the child.
HELD: dict[str, Held] = {
    "attribute": Held("self.{n} = {m}", "self.{n}"),
    "two names": Held("self.{n} = self.other_{n} = {m}", "self.other_{n}"),
    "ModuleList": Held("self.{n} = nn.ModuleList([{m}])", "self.{n}[0]"),
    "ModuleDict": Held("self.{n} = nn.ModuleDict({{'key': {m}}})", "self.{n}['key']"),
    "Sequential": Held("self.{n} = nn.Sequential({m})", "self.{n}", is_module=False),
    "list": Held("self.{n} = [{m}]", "self.{n}[0]"),
    "tuple": Held("self.{n} = ({m},)", "self.{n}[0]"),
    "dict": Held("self.{n} = {{'key': {m}}}", "self.{n}['key']"),
    "closure": Held("self.{n} = lambda x: {m}(x)", "self.{n}", is_module=False),
    "default": Held("self.{n} = lambda x, module={m}: module(x)", "self.{n}", is_module=False),
    "property": Held(
        "self.held_{n} = [{m}]", "self.{n}", "@property\ndef {n}(self):\n    return self.held_{n}[0]"
    ),
    "partial": Held("self.{n} = functools.partial(apply, {m})", "self.{n}", is_module=False),
    "partial of it": Held("self.{n} = functools.partial({m})", "self.{n}", is_module=False),
    "bound method": Held("self.{n} = {m}.__call__", "self.{n}", is_module=False),
    "forward": Held("self.{n} = {m}.forward", "self.{n}", is_module=False),
    "weakref": Held("self.{n} = weakref.ref({m})", "self.{n}()"),
    "proxy": Held("self.{n} = [weakref.proxy({m})]", "self.{n}[0]"),
    "object": Held("self.{n} = Holder({m})", "self.{n}.module"),
    "__setattr__": Held("object.__setattr__(self, '{n}', {m})", "self.{n}"),
}

#: References that `copy.deepcopy` hands on as they are.
UNCOPIED = {"closure", "default", "weakref", "proxy"}

#: What a forward computes without a layer, {t} from {v}; the first is taken for the simplest.
FUNCTIONS: dict[str, str] = {
    "relu": "{t} = F.relu({v})",
    "tanh": "{t} = {v}.tanh()",
    "twice": "{t} = 2 * {v}",
    "swish": "{t} = Swish.apply({v})",
    "scaled gradient": "{t} = ScaledGradient.apply({v})",
    "detached": "{t} = {v} + {v}.detach()",
    "clone": "{t} = {v}.clone()",
    "size": "b, c, h, w = {v}.size()\n{t} = {v}.reshape(b, c, h, w)",
    "shape": "{t} = {v}.view({v}.shape[0], -1).view({v}.shape)",
    "shape as a number": "{t} = {v} * {v}.shape[1]",
    "chunk": "a, b, c = {v}.chunk(3, 1)\n{t} = torch.cat([c, a, b], 1)",
    "split": "a, b, c = torch.split({v}, 1, dim=1)\n{t} = torch.cat([b, c, a], 1)",
    "unbind": "a, b, c = {v}.unbind(1)\n{t} = torch.stack([b, a, c], 1)",
    "dtype": "{t} = {v}.to({v}.dtype)",
    "print": "print({v}.shape)\n{t} = {v}",
    "assert isinstance": "assert isinstance({v}, Tensor)\n{t} = {v}",
    "return unless isinstance": "if not isinstance({v}, Tensor):\n    return None\n{t} = {v}",
    "return unless is_tensor": "if not torch.is_tensor({v}):\n    raise TypeError\n{t} = {v}",
    "assert dim": "assert {v}.dim() == 4, {v}.shape\n{t} = {v}",
    "item": "{t} = {v} * (1 + abs({v}.mean().item()))",
    "loop over a number": "{t} = {v}\nfor _ in range(int({v}.mean() > 100) + 1):\n    {t} = {t} + 1",
    "write through data": "{t} = {v} + 0\n{t}.data[:, :1] = 1.0",
}
#: Those whose result is no new tensor, or one that is needed for the backward pass.
ALIASES = {"size", "shape", "dtype", "print", "item"}

#: The same in place.
IN_PLACE: dict[str, str] = {
    "relu_": "{t} = F.relu({v}, inplace=True)",
    "mul_": "{t} = {v}.mul_(2.0)",
    "add_": "{v} += 1\n{t} = {v}",
    "setitem": "{v}[:, 0] = 1.0\n{t} = {v}",
    "slice": "{v}[:, :1].mul_(2.0)\n{t} = {v}",
}

#: What a forward may branch on.
CONDITIONS: dict[str, str] = {
    "flag": "self.flag",
    "training": "self.training",
    "option": "option is not None",
    "keyword": "kwargs.get('extra')",
    "enum": "self.way is Way.FIRST",
    "data": "{v}.sum() > 0.123",
    "isinstance": "isinstance({v}, Tensor)",
    "is_tensor": "torch.is_tensor({v})",
    "shape": "{v}.shape[1] == 3",
    "ndim": "{v}.ndim != 4",
    "dtype": "{v}.dtype == torch.float64",
    "dtype is": "{v}.dtype is torch.float64",
    "grad mode": "torch.is_grad_enabled()",
    "requires_grad": "{v}.requires_grad",
}

#: How a loop over modules tells batch norms.
CHECKS: dict[str, str] = {
    "isinstance": "isinstance(m, nn.BatchNorm2d)",
    "type": "type(m) is nn.BatchNorm2d",
    "class": "m.__class__ is nn.BatchNorm2d",
    "type of convolution": "type(m) is nn.Conv2d",
}

_LOOP = """{t} = {v}
for m in ({modules},):
    if {condition}:
        {t} = {t} + 1
    {t} = m({t})"""

#: How often a forward calls the first of several children, or how many of them: twice, where an exploration guesses.
NUMBERS: dict[str, str] = {
    "size": "{v}.shape[0] % 3",
    "number": "int({v}.shape[0]) % 3",
    "tensor": "int(({v} < 1e30).sum().clamp(max=2))",
}
_REPEATED = """{t} = {v}
for _ in range({number}):
    {t} = {first}({t})
{t} = {rest}"""
_SOME_OF = """{t} = {v}
for m in ({modules},)[:{number}]:
    {t} = m({t})"""

#: What an exploration sees no number in, and how one of several children is picked by it.
UNSEEN: dict[str, str] = {
    "grad mode": "int(torch.is_grad_enabled())",
    "a set": "int({v}.shape[0] in {{2, 8}})",
    "text": "int(str({v}.shape[1]) == '3')",
    "a class": "int(isinstance({v}, list))",
}
PICKED: dict[str, str] = {
    "number": "({modules},)[{number} % {count}]",
    "helper": "pick({number} % {count}, [{modules}])",
    "name": "getattr(Numbered({modules}), f'part{{{number} % {count}}}')",
}

#: How children are called one after another.
AROUND: dict[str, str] = {
    "plain": "{t} = {chain}",
    "lines": "",
    "static method": "{t} = self.run({v}, {modules})",
    "method": "{t} = self.step{i}({v})",
    "decorated method": "{t} = self.decorated{i}({v})",
    "public method": "{t} = self.embed{i}({v})",
    "lambda": "{t} = (lambda x: {inner})({v})",
    "no_grad": "with torch.no_grad():\n    {t} = {chain}",
    "autocast": "with torch.autocast('cpu', dtype=torch.bfloat16):\n    {t} = {chain}",
    "checkpoint": "{t} = checkpoint(lambda x: {inner}, {v}, use_reentrant=False)",
    "reentrant checkpoint": "{t} = checkpoint(lambda x: {inner}, {v}, use_reentrant=True)",
    **{f"loop, {check}": _LOOP.replace("{condition}", condition) for check, condition in CHECKS.items()},
    **{f"repeated, {name}": _REPEATED.replace("{number}", number) for name, number in NUMBERS.items()},
    **{f"some of them, {name}": _SOME_OF.replace("{number}", number) for name, number in NUMBERS.items()},
    **{
        f"one by {way}, {name}": f"i = {number}\n{{t}} = {picked.replace('{number}', 'i')}({{v}})"
        for way, picked in PICKED.items()
        for name, number in UNSEEN.items()
    },
}

#: What a forward reads of a layer, as a factor.
READ: dict[str, str] = {
    "num_features": "{m}.num_features",
    "eps": "(1 + {m}.eps)",
    "running_mean": "{m}.running_mean.view(-1, 1, 1)",
    "bias": "{m}.bias.view(-1, 1, 1)",
    "act": "len(list({m}.children()))",
    "out_channels": "{m}.out_channels",
    "gain": "{m}.gain",
    "weight": "{m}.weight.mean()",
    "class name": "len(type({m}).__name__)",
    "repr": "len(repr({m}))",
}
READ_OF: dict[str, tuple[str, ...]] = {
    "num_features": ("norm",),
    "eps": ("norm",),
    "running_mean": ("norm",),
    "out_channels": ("conv",),
    "weight": ("conv",),
    "class name": ("conv", "norm"),
}


#: How a forward keeps a momentum copy {b} of a weight {w}.
MOMENTUM: dict[str, str] = {
    "in place": "{b}.mul_(0.5).add_({w}.detach())",
    "foreach": "torch._foreach_lerp_([{b}], [{w}.detach()], 0.5)",
    "out": "torch.add({b}, {w}.detach(), alpha=0.5, out={b})",
    "data": "{b}.data += 0.5 * {w}.data",
    "new data": "{b}.data = {b} + 0.5 * {w}.detach()",
    "numpy": "{b}.numpy()[:] += 0.5 * {w}.detach().numpy()",
}


# --- Modules -----------------------------------------------------------------------------------------------------

_spec = dataclass(frozen=True, repr=False)


@_spec
class Conv(Brief):
    """A convolution that keeps the shape."""

    cls: str = "nn.Conv2d"
    kernel: int = 1
    bias: bool = True
    tied: int | None = None  # the convolution whose weight it has
    frozen: bool = False

    kind = "conv"

    def source(self) -> str:
        if self.cls == "nn.Linear":
            return f"{self.cls}(3, 3, bias={self.bias})"
        return f"{self.cls}(3, 3, {self.kernel}, padding={self.kernel // 2}, bias={self.bias})"


@_spec
class Norm(Brief):
    cls: str = "nn.BatchNorm2d"
    affine: bool = True
    tied: int | None = None
    training: bool = False

    kind = "norm"

    def source(self) -> str:
        return f"{self.cls}(3, affine={self.affine})"


@_spec
class Act(Brief):
    code: str = "nn.ReLU()"

    kind = "act"

    @property
    def overwrites(self) -> bool:
        return "True" in self.code

    def source(self) -> str:
        return self.code


#: Where there is a linear layer, there are only such, and their batch norms.
FLAT = ("nn.Linear", "nn.BatchNorm1d")
CONVS = (
    "nn.Conv2d",
    "NamedConv",
    "SamePaddingConv",
    "PlainConv",
    "DoublingConv",
    "DoublingCallConv",
    "StandardizedConv",
    "StandardizedInnerConv",
    "PropertyConv",
    "InterceptedConv",
)
NORMS = ("nn.BatchNorm2d", "NamedNorm", "FunctionalNorm", "FrozenNorm", "ActivatedNorm", "DoublingNorm")
ACTS = (
    *("nn.ReLU()", "nn.SiLU()", "SwishModule()", "nn.ReLU(inplace=True)", "nn.SiLU(inplace=True)"),
    *("nn.GELU()", "nn.Mish(inplace=True)", "nn.ELU()", "nn.Hardswish(inplace=True)"),
)
#: Convolutions whose weight is a parameter of that name.
WITH_WEIGHT = frozenset({*CONVS, "nn.Linear"}) - {"PropertyConv", "InterceptedConv"}
#: Layers whose output is a new tensor that their backward pass does not need.
FRESH = frozenset(CONVS) | {*FLAT, "nn.BatchNorm2d", "NamedNorm", "FunctionalNorm", "DoublingNorm"}


# --- Steps of a forward ------------------------------------------------------------------------------------------


@_spec
class Child(Brief):
    """A reference to an earlier module of the list."""

    module: int
    held: str = "attribute"


class Written(NamedTuple):
    """Code of a forward, and what it needs of the class around it."""

    code: str
    methods: tuple[str, ...] = ()


@_spec
class Apply(Brief):
    """Calls children one after another."""

    source: int
    chain: tuple[int, ...]
    around: str = "plain"
    method: str = ""  # of the first, in place of calling it

    @property
    def features(self) -> set[str]:
        return {f"around: {self.around}", *(["method of a child"] if self.method else [])}

    def write(self, block: "Block", i: int, v: str, t: str) -> Written:
        modules = [block.read(slot) for slot in self.chain]
        first = f"{modules[0]}.{self.method}" if self.method else modules[0]
        called = [first, *modules[1:]]

        def nested(x: str, chain: list[str] = called) -> str:
            for module in chain:
                x = f"{module}({x})"
            return x

        if self.around == "lines":
            lines = [f"{t} = {module}({t if place else v})" for place, module in enumerate(called)]
            return Written("\n".join(lines))
        code = AROUND[self.around].format(
            t=t,
            v=v,
            i=i,
            chain=nested(v),
            inner=nested("x"),
            modules=", ".join(called),
            count=len(called),
            first=first,
            rest=nested(t, called[1:]),
        )
        if self.around == "static method":
            text = (
                "@staticmethod\ndef run(x, *modules):\n    for m in modules:\n        x = m(x)\n    return x"
            )
            return Written(code, (text,))
        methods = {"method": "step", "decorated method": "decorated", "public method": "embed"}
        if self.around in methods:
            decorator = "@decorated\n" if self.around == "decorated method" else ""
            name = f"{methods[self.around]}{i}"
            return Written(code, (f"{decorator}def {name}(self, x):\n    return {nested('x')}",))
        return Written(code)


@_spec
class Function(Brief):
    source: int
    name: str = "relu"

    @property
    def features(self) -> set[str]:
        return {f"function: {self.name}"}

    def write(self, block: "Block", i: int, v: str, t: str) -> Written:
        return Written({**FUNCTIONS, **IN_PLACE}[self.name].format(v=v, t=t))


@_spec
class Add(Brief):
    source: int
    other: int

    @property
    def features(self) -> set[str]:
        return {"add"}

    def write(self, block: "Block", i: int, v: str, t: str) -> Written:
        return Written(f"{t} = {v} + v{self.other}")


@_spec
class Weight(Brief):
    """Reads the weight of a convolution for a convolution of its own."""

    source: int
    slot: int
    transposed: bool = False

    @property
    def features(self) -> set[str]:
        return {"weight"}

    def write(self, block: "Block", i: int, v: str, t: str) -> Written:
        function = "conv_transpose2d" if self.transposed else "conv2d"
        weight = f"{block.read(self.slot)}.weight"
        return Written(f"{t} = F.{function}({v}, {weight}, padding={weight}.shape[-1] // 2)")


@_spec
class Momentum(Brief):
    """Writes to a momentum copy of a convolution's weight, and multiplies by its mean."""

    source: int
    slot: int
    writer: str = "in place"
    is_buffer: bool = True  # or a plain attribute

    def made(self, i: int) -> str:
        copied = f"m{self.slot}.weight.detach().clone()"
        name = f"momentum{i}"
        return f"self.register_buffer('{name}', {copied})" if self.is_buffer else f"self.{name} = {copied}"

    @property
    def features(self) -> set[str]:
        return {f"momentum: {self.writer}", f"momentum is {'a' if self.is_buffer else 'no'} buffer"}

    def write(self, block: "Block", i: int, v: str, t: str) -> Written:
        b, w = f"self.momentum{i}", f"{block.read(self.slot)}.weight"
        return Written(f"{MOMENTUM[self.writer].format(b=b, w=w)}\n{t} = {v} * {b}.mean()")


@_spec
class Read(Brief):
    """Reads an attribute of a layer."""

    source: int
    slot: int
    attribute: str

    @property
    def features(self) -> set[str]:
        return {f"read: {self.attribute}"}

    def write(self, block: "Block", i: int, v: str, t: str) -> Written:
        return Written(f"{t} = {v} * {READ[self.attribute].format(m=block.read(self.slot))}")


@_spec
class Branch(Brief):
    """One step or another, or none."""

    condition: str
    then: Any
    otherwise: Any = None

    @property
    def source(self) -> int:
        return self.then.source

    @property
    def features(self) -> set[str]:
        return {f"if {self.condition}"}.union(
            *(part.features for part in (self.then, self.otherwise) if part)
        )

    def write(self, block: "Block", i: int, v: str, t: str) -> Written:
        then = self.then.write(block, i, v, t)
        otherwise = Written(f"{t} = {v}")
        if self.otherwise is not None:
            otherwise = self.otherwise.write(block, f"{i}_", v, t)
        condition = CONDITIONS[self.condition].format(v=v)
        code = f"if {condition}:\n{_indented(then.code)}\nelse:\n{_indented(otherwise.code)}"
        return Written(code, then.methods + otherwise.methods)


Step = Apply | Function | Add | Weight | Momentum | Read | Branch


@_spec
class Block(Brief):
    """A module with a forward of its own."""

    children: tuple[Child, ...] = ()
    steps: tuple[Step, ...] = ()
    outputs: tuple[int, ...] = ()  # values that are returned besides the last one
    public: tuple[int, ...] = ()  # children that its method `features` calls one after another
    public_name: str = "features"
    hook: int | None = None  # a child that a pre-forward hook calls on the input
    flag: bool = False
    trains: bool = False  # has a `train` of its own

    kind = "block"

    def read(self, slot: int) -> str:
        return HELD[self.children[slot].held].read.format(n=f"c{slot}")

    @property
    def conditions(self) -> Iterator[str]:
        return (step.condition for step in self.steps if isinstance(step, Branch))

    @property
    def around(self) -> Iterator[str]:
        for step in self.steps:
            parts = (step.then, step.otherwise) if isinstance(step, Branch) else (step,)
            yield from (part.around for part in parts if isinstance(part, Apply))

    @property
    def parts_of_forward(self) -> list[str]:
        """The public methods that its forward calls."""
        steps = enumerate(self.steps)
        return [f"embed{i}" for i, step in steps if getattr(step, "around", "") == "public method"]

    def write(self, name: str) -> str:
        slots = [f"c{slot}" for slot in range(len(self.children))]
        made = [
            HELD[child.held].made.format(n=f"c{slot}", m=f"m{slot}")
            for slot, child in enumerate(self.children)
        ]
        of_class = [HELD[child.held].of_class.format(n=f"c{i}") for i, child in enumerate(self.children)]
        if "flag" in self.conditions:
            made.append(f"self.flag = {self.flag}")
        if "enum" in self.conditions:
            made.append("self.way = Way.FIRST")
        if self.hook is not None:
            made.append(f"self.register_forward_pre_hook(lambda module, args: (m{self.hook}(args[0]),))")
        made += [step.made(i) for i, step in enumerate(self.steps) if isinstance(step, Momentum)]
        lines = []
        for i, step in enumerate(self.steps):
            written = step.write(self, i, f"v{step.source}" if step.source else "x", f"v{i + 1}")
            lines.append(written.code)
            of_class.extend(written.methods)
        last = f"v{len(self.steps)}" if self.steps else "x"
        outputs = [last, *(f"v{output}" if output else "x" for output in self.outputs)]
        lines.append(f"return {outputs[0]}" if len(outputs) == 1 else f"return [{', '.join(outputs)}]")
        if self.public:
            result = "x"
            for slot in self.public:
                result = f"{self.read(slot)}({result})"
            of_class.append(f"def {self.public_name}(self, x):\n    return {result}")
        if self.trains:
            of_class.append(_TRAIN)
        options = ", option=None" if "option" in self.conditions else ""
        options += ", **kwargs" if "keyword" in self.conditions else ""
        init = "\n".join(
            [
                f"def __init__(self{''.join(f', m{slot}' for slot in range(len(slots)))}):",
                _indented("\n".join(["super().__init__()", *made])),
            ]
        )
        forward = f"def forward(self, x{options}):\n" + _indented("\n".join(lines).replace("v0", "x"))
        parts = [init, *dict.fromkeys(filter(None, of_class)), forward]
        return f"class {name}(nn.Module):\n" + _indented("\n\n".join(parts))


_TRAIN = """def train(self, mode=True, freeze_bn=False):
    super().train(mode)
    for module in self.modules():
        if isinstance(module, nn.BatchNorm2d) and freeze_bn:
            module.eval()
    return self"""


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else line for line in text.split("\n"))


# --- Trees -------------------------------------------------------------------------------------------------------

_HEADER = """import functools
import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tree_parts import *
"""


class Built(NamedTuple):
    model: nn.Module
    modules: dict[int, nn.Module]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those of all modules, registered or not."""
        return {
            f"{index}.{name}": parameter
            for index, module in self.modules.items()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }


@_spec
class Tree(Brief):
    """A whole model; the last module is its root."""

    modules: tuple[Any, ...]
    homeless: bool = False  # modules that no block registers stay unregistered

    @property
    def root(self) -> Block:
        return self.modules[-1]

    def example_input(self, seed: int = 0) -> Tensor:
        is_flat = any(getattr(module, "cls", "") in FLAT for module in self.modules)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(FLAT_SHAPE if is_flat else SHAPE, generator=generator, dtype=torch.float64)

    @property
    def around(self) -> set[str]:
        """The ways in which its blocks call children."""
        return {
            around
            for index in self.reached
            if isinstance(block := self.modules[index], Block)
            for around in block.around
        }

    @property
    def can_be_copied(self) -> bool:
        """Whether `copy.deepcopy` copies every module, and not a reference to it."""
        blocks = [self.modules[index] for index in self.reached if isinstance(self.modules[index], Block)]
        held = {child.held for block in blocks for child in block.children}
        return not (held & UNCOPIED or any(block.hook is not None for block in blocks))

    @property
    def reached(self) -> list[int]:
        """The modules that are part of the model, in order."""
        seen: set[int] = set()

        def visit(index: int) -> None:
            if index not in seen:
                seen.add(index)
                module = self.modules[index]
                for child in getattr(module, "children", ()):
                    visit(child.module)
                if getattr(module, "tied", None) is not None:
                    visit(module.tied)

        visit(len(self.modules) - 1)
        return sorted(seen)

    def write(self) -> str:
        """Python source: the blocks' classes, equal ones once, and a function that builds the model."""
        classes: dict[str, str] = {}
        lines = []
        for index in self.reached:
            module = self.modules[index]
            if isinstance(module, Block):
                name = classes.setdefault(module.write("Block"), f"Block{len(classes)}")
                arguments = ", ".join(f"m{child.module}" for child in module.children)
                lines.append(f"m{index} = {name}({arguments})")
            else:
                lines.append(f"m{index} = {module.source()}")
                if module.tied is not None if hasattr(module, "tied") else False:
                    lines.append(f"m{index}.weight = m{module.tied}.weight")
                if getattr(module, "frozen", False):
                    lines.append(f"m{index}.weight.requires_grad_(False)")
        modules = ", ".join(f"{index}: m{index}" for index in self.reached)
        lines.append(f"return {{{modules}}}")
        texts = [text.replace("class Block(", f"class {name}(") for text, name in classes.items()]
        return "\n\n\n".join([_HEADER, *texts, "def build():\n" + _indented("\n".join(lines))]) + "\n"

    def build(self) -> Built:
        """The model in float64 and Eval mode, all of it random."""
        default = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float64)
            try:
                modules = _compiled(self.write())()
            finally:
                torch.set_default_dtype(default)
        root = modules[len(self.modules) - 1]
        registered = set(root.modules())
        if not self.homeless:
            away = [module for module in modules.values() if module not in registered]
            if away:
                root.kept = nn.ModuleList(away)
        everything = nn.ModuleList(modules.values())
        randomize_batchnorms(everything)
        everything.eval()
        for index, module in modules.items():
            if isinstance(self.modules[index], Norm) and self.modules[index].training:
                module.train()
        return Built(root, modules)


@lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    name = f"<tree {hash(source):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": f"tree_{hash(source):x}"}
    exec(compile(source, name, "exec"), namespace)
    return namespace["build"]


# --- Strategies --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """What may be drawn, each as often as it stands there: the plainest first."""

    convs: Sequence[str] = CONVS
    norms: Sequence[str] = NORMS
    acts: Sequence[str] = ACTS
    held: Sequence[str] = tuple(HELD)
    functions: Sequence[str] = tuple(FUNCTIONS)
    in_place: Sequence[str] = tuple(IN_PLACE)
    conditions: Sequence[str] = tuple(CONDITIONS)
    around: Sequence[str] = tuple(AROUND)
    read: Sequence[str] = tuple(READ_OF)
    momentum: Sequence[str] = tuple(MOMENTUM)
    training: bool = True  # batch norms in Train mode
    tied: bool = True
    weights: bool = True  # that forwards read
    public: bool = True  # methods besides forward
    hooks: bool = True
    homeless: bool = True
    overwrites: bool = False  # in place what autograd needs
    flat: bool = True  # linear layers

    def without(self, **names: Sequence[str]) -> "Features":
        """The same but for these."""
        kept = {
            field: tuple(name for name in getattr(self, field) if name not in left_out)
            for field, left_out in names.items()
        }
        return replace(self, **kept)


PLAIN = Features(
    convs=("nn.Conv2d",),
    norms=("nn.BatchNorm2d",),
    acts=("nn.ReLU()",),
    held=("attribute",),
    functions=("relu",),
    in_place=(),
    conditions=(),
    around=("plain", "lines"),
    read=(),
    momentum=(),
    training=False,
    tied=False,
    weights=False,
    public=False,
    hooks=False,
    homeless=False,
    flat=False,
)
#: What does not ask for feature maps.
_FLAT = {
    "functions": (
        "relu",
        "tanh",
        "twice",
        "swish",
        "scaled gradient",
        "detached",
        "clone",
        "item",
        "chunk",
        "print",
    ),
    "in_place": ("relu_", "mul_", "add_", "setitem"),
    "read": ("num_features", "eps", "weight", "class name"),
}


@st.composite
def some(draw: st.DrawFn, features: Features) -> Features:
    """A few of the features: where everything may be drawn at once, little of it meets."""
    few = {
        name: tuple(draw(st.lists(_pick(names), min_size=1, max_size=most, unique=True)))
        for name, most in (
            ("convs", 1),
            ("norms", 1),
            ("acts", 2),
            ("held", 2),
            ("functions", 3),
            ("in_place", 1),
            ("conditions", 2),
            ("around", 2),
            ("read", 1),
            ("momentum", 1),
        )
        if (names := getattr(features, name))
    }
    for name in ("training", "tied", "weights", "public", "hooks", "homeless"):
        few[name] = getattr(features, name) and draw(st.booleans())
    return replace(features, **few)


def _flattened(features: Features) -> Features:
    """The same for linear layers."""
    kept = {
        field: tuple(name for name in getattr(features, field) if name in names)
        for field, names in _FLAT.items()
    }
    return replace(features, convs=FLAT[:1], norms=FLAT[1:], weights=False, **kept)


@cache
def _picked(choices: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    return st.sampled_from(choices)


def _pick(choices: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of these: the strategy is made and validated once, which takes longer than to draw."""
    return _picked(tuple(choices))


def _often(plain: str, others: Sequence[str]) -> st.SearchStrategy[str]:
    """Half of the time the plain one."""
    return _pick([plain] * max(1, len(others)) + [*others])


@st.composite
def _leaves(draw: st.DrawFn, features: Features) -> list[Any]:
    leaves: list[Any] = []
    few = _pick([1, 1, 2, 2, 2, 3])  # the fewer there are, the more is shared
    for _ in range(draw(few)):
        plain = "nn.Linear" if "nn.Linear" in features.convs else "nn.Conv2d"
        cls, kernel = draw(_often(plain, features.convs)), draw(_pick([1, 3]))
        like = [i for i, conv in enumerate(leaves) if conv.cls in WITH_WEIGHT and conv.kernel == kernel]
        tied = None
        if features.tied and cls in WITH_WEIGHT and like and draw(st.integers(0, 3)) == 3:
            tied = draw(_pick(like))
        frozen = cls in WITH_WEIGHT and draw(st.integers(0, 7)) == 7
        leaves.append(Conv(cls, kernel, draw(st.booleans()), tied, frozen))
    for _ in range(draw(few)):
        plain = "nn.BatchNorm1d" if "nn.BatchNorm1d" in features.norms else "nn.BatchNorm2d"
        cls, affine = draw(_often(plain, features.norms)), not draw(st.booleans())
        tieable = cls != "FrozenNorm" and affine
        like = [
            i
            for i, norm in enumerate(leaves)
            if norm.kind == "norm" and norm.affine and norm.cls != "FrozenNorm"
        ]
        tied = (
            draw(_pick(like)) if features.tied and tieable and like and draw(st.integers(0, 3)) == 3 else None
        )
        training = features.training and cls != "FrozenNorm" and draw(st.integers(0, 7)) == 7
        leaves.append(Norm(cls, affine, tied, training))
    acts = _pick(features.acts or ("nn.ReLU()",))
    leaves.extend(Act(draw(acts)) for _ in range(draw(st.integers(0, 2))))
    return leaves


class _Scope:
    """What there is while a block is drawn."""

    def __init__(self, modules: list[Any], costs: list[int], features: Features) -> None:
        self.modules = modules
        self.costs = costs
        self.features = features
        self.children: list[Child] = []
        self.steps: list[Step] = []
        self.cost = 0
        self.unread: set[int] = set()
        self.fresh: set[int] = set()  # new tensors that no backward pass needs

    def module(self, slot: int) -> Any:
        return self.modules[self.children[slot].module]

    def add(self, step: Step, fresh: bool = False) -> None:
        self.steps.append(step)
        value = len(self.steps)
        self.unread -= {step.source, getattr(step, "other", step.source)}
        self.unread.add(value)
        if fresh:
            self.fresh.add(value)

    @property
    def changeable(self) -> list[int]:
        """The values that may be changed in place."""
        if self.features.overwrites:
            return list(range(len(self.steps) + 1))
        return sorted(self.fresh & self.unread)

    def affordable(self, kind: str) -> list[int]:
        return [
            index
            for index, module in enumerate(self.modules)
            if module.kind == kind and self.cost + self.costs[index] <= LARGEST_COST
        ]

    def snippet(self, chain: Iterable[int]) -> bool:
        """Whether what the chain returns may be changed in place."""
        last = self.module(list(chain)[-1])
        return getattr(last, "cls", None) in FRESH


@st.composite
def _slot(draw: st.DrawFn, scope: _Scope, candidates: Sequence[int], is_module: bool = False) -> int:
    """A reference to one of these modules: one there is, or a new one."""
    module = draw(_pick(candidates))
    slots = [
        slot
        for slot, child in enumerate(scope.children)
        if child.module == module and (HELD[child.held].is_module or not is_module)
    ]
    if slots and draw(st.integers(0, 4)) < 4:
        return draw(_pick(slots))
    held = [name for name in scope.features.held if HELD[name].is_module or not is_module]
    hold = draw(_often("attribute", held))
    scope.children.append(Child(module, hold))
    return len(scope.children) - 1


_CHAINS = (
    ("conv", "norm"),
    ("conv", "norm", "act"),
    ("conv",),
    ("norm",),
    ("block",),
    ("act",),
    ("conv", "act"),
    ("conv", "norm", "conv", "norm"),
    ("block", "norm"),
    ("conv", "block"),
    ("norm", "act"),
)


@st.composite
def _apply(draw: st.DrawFn, scope: _Scope, source: int | None = None) -> Apply:
    possible = [chain for chain in _CHAINS if all(scope.affordable(kind) for kind in chain)]
    if source is None:
        source = draw(_source(scope))
    blocks = [chain for chain in possible if "block" in chain]
    kinds = draw(_pick([*possible[:2] * 4, *possible, *possible[2:4] * 2, *blocks * 4]))
    chain: list[int] = []
    for kind in kinds:
        candidates = scope.affordable(kind) or scope.affordable("conv")
        if kind == "act":
            may_change = scope.features.overwrites or (
                scope.snippet(chain) if chain else source in scope.changeable
            )
            candidates = [c for c in candidates if may_change or not scope.modules[c].overwrites]
        if not candidates:
            continue
        slot = draw(_slot(scope, candidates))
        chain.append(slot)
        scope.cost += scope.costs[scope.children[slot].module]
    if not chain:
        chain = [draw(_slot(scope, [0]))]
    around = draw(_often("plain", ("plain", "lines", *scope.features.around)))
    changes = any(getattr(scope.module(slot), "overwrites", False) for slot in chain)
    if changes and around.startswith(
        ("reentrant", "checkpoint", "repeated", "one")
    ):  # which run twice, or on another value
        around = "lines"
    method = ""
    first = scope.module(chain[0])
    held = HELD[scope.children[chain[0]].held]
    if isinstance(first, Block) and first.public and held.is_module and draw(st.booleans()):
        around, method = (
            ("plain" if around.startswith(("loop", "static", "some")) else around),
            first.public_name,
        )
    return Apply(source, tuple(chain), around, method)


def _source(scope: _Scope) -> st.SearchStrategy[int]:
    last = len(scope.steps)
    return _pick([last, last, last, last, *range(last, -1, -1)])


@st.composite
def _function(draw: st.DrawFn, scope: _Scope, source: int | None = None) -> Function:
    names = list(scope.features.functions)
    if source is None:
        source = draw(_source(scope))
    if source in scope.changeable and scope.features.in_place:
        names += scope.features.in_place
    return Function(source, draw(_pick(names)))


@st.composite
def _weight(draw: st.DrawFn, scope: _Scope) -> Weight:
    convs = scope.affordable("conv")
    return Weight(draw(_source(scope)), draw(_slot(scope, convs, is_module=True)), draw(st.booleans()))


@st.composite
def _momentum(draw: st.DrawFn, scope: _Scope) -> Momentum:
    slot = draw(_slot(scope, scope.affordable("conv"), is_module=True))
    if scope.module(slot).cls not in WITH_WEIGHT:
        return draw(_weight(scope))
    return Momentum(draw(_source(scope)), slot, draw(_pick(scope.features.momentum)), draw(st.booleans()))


@st.composite
def _read(draw: st.DrawFn, scope: _Scope) -> Read:
    attribute = draw(_pick(scope.features.read))
    of = [
        index
        for index, module in enumerate(scope.modules)
        if module.kind in READ_OF[attribute] and (attribute != "bias" or module.bias)
    ]
    return Read(draw(_source(scope)), draw(_slot(scope, of, is_module=True)), attribute)


@st.composite
def _branch(draw: st.DrawFn, scope: _Scope) -> Branch:
    condition = draw(_pick(scope.features.conditions))
    source = draw(_source(scope))
    then = draw(_apply(scope, source))
    others = st.none() | _function(scope, source) if scope.features.functions else st.none()
    otherwise = draw(others | _apply(scope, source) if scope.affordable("conv") else others)
    return Branch(condition, then, otherwise)


@st.composite
def _add_steps(draw: st.DrawFn, scope: _Scope) -> Add:
    values = st.integers(0, len(scope.steps))
    return Add(draw(_source(scope)), draw(values))


@st.composite
def _block(draw: st.DrawFn, modules: list[Any], costs: list[int], features: Features) -> Block:
    scope = _Scope(modules, costs, features)
    choices: list[Any] = [_apply] * 6 + [_add_steps]
    if features.functions:
        choices += [_function] * 2
    if features.weights:
        choices += [_weight]
    if features.read:
        choices += [_read]
    if features.momentum:
        choices += [_momentum]
    if features.conditions:
        choices += [_branch] * 3
    for _ in range(draw(_pick([1, 2, 3, 3, 4, 4]))):
        if scope.cost >= LARGEST_COST or not scope.affordable("conv"):
            break
        step = draw(draw(_pick(choices))(scope))
        fresh = isinstance(step, Apply) and step.around in ("plain", "lines") and scope.snippet(step.chain)
        scope.add(step, fresh and not step.method)
    changing = {
        slot for slot in range(len(scope.children)) if getattr(scope.module(slot), "overwrites", False)
    }
    slots = sorted(set(range(len(scope.children))) - changing)
    public: tuple[int, ...] = ()
    if features.public and slots and draw(st.booleans()):
        public = tuple(draw(st.lists(_pick(slots), min_size=1, max_size=2)))
    hook = None
    if features.hooks and draw(st.integers(0, 9)) == 9:
        hook = draw(_slot(scope, scope.affordable("conv") or [0]))
    name = draw(_pick(["features", "explore", "discover", "embed"])) if public else "features"
    value = st.integers(0, len(scope.steps))
    return Block(
        tuple(scope.children),
        tuple(scope.steps),
        outputs=draw(st.just(()) | st.just(()) | st.tuples(value)),
        public=public,
        public_name=name,
        hook=hook,
        flag=bool(features.conditions) and draw(st.booleans()),
        trains=features.public and draw(st.integers(0, 3)) == 3,
    ), scope.cost


@st.composite
def trees(draw: st.DrawFn, features: Features = Features()) -> Tree:
    """Models of up to eight layers and four blocks."""
    flat = features.flat and draw(st.integers(0, 7)) == 7
    features = draw(some(_flattened(features) if flat else features))
    modules = draw(_leaves(features))
    costs = [1] * len(modules)
    for _ in range(draw(_pick([0, 1, 2, 2, 3, 3]))):
        earlier = [index for index, module in enumerate(modules) if isinstance(module, Block)]
        if earlier and draw(st.integers(0, 2)) == 2:
            like = draw(_pick(earlier))
            modules.append(draw(_sibling(modules, modules[like])))
            costs.append(costs[like])
        else:
            block, cost = draw(_block(modules, costs, features))
            modules.append(replace(block, outputs=()))
            costs.append(max(cost, 1))
    root, _ = draw(_block(modules, costs, features))
    return Tree((*modules, root), homeless=features.homeless and draw(st.integers(0, 4)) == 4)


@st.composite
def _sibling(draw: st.DrawFn, modules: list[Any], block: Block) -> Block:
    """Another instance of a block's class, with children of the same kinds."""
    children = []
    for child in block.children:
        module = modules[child.module]
        same = [child.module]
        if not isinstance(module, Block):
            same += [
                index
                for index, other in enumerate(modules)
                if other.kind == module.kind
                and getattr(other, "overwrites", False) == getattr(module, "overwrites", False)
                and (getattr(other, "cls", None) in FRESH) == (getattr(module, "cls", None) in FRESH)
            ]
        children.append(replace(child, module=draw(_pick(same))))
    return replace(block, children=tuple(children))


# --- What a tree has ---------------------------------------------------------------------------------------------


def features_of(tree: Tree) -> set[str]:
    """What is special about a tree, by the names above."""
    found: set[str] = set()
    registered: list[int] = []
    for index in tree.reached:
        module = tree.modules[index]
        if isinstance(module, Block):
            found |= _features_of_block(module)
            found |= {
                "children twice"
                for child in module.children
                if [c.module for c in module.children].count(child.module) > 1
            }
            registered += {child.module for child in module.children}
        else:
            found.add(module.code if isinstance(module, Act) else module.cls)
            found |= {
                f"{module.kind} {name}"
                for name in ("tied", "training", "frozen")
                if getattr(module, name, None) not in (None, False)
            }
    for index in tree.reached:
        if registered.count(index) > 1:
            found.add(f"shared {tree.modules[index].kind}")
    texts = [module.write("") for index in tree.reached if isinstance(module := tree.modules[index], Block)]
    if len(set(texts)) < len(texts):
        found.add("two of a class")
    if tree.homeless:
        found.add("homeless")
    return found


def _features_of_block(block: Block) -> set[str]:
    found = {f"held: {child.held}" for child in block.children}
    found |= {name for name in ("outputs", "public", "trains") if getattr(block, name)}
    if block.hook is not None:
        found.add("hook")

    return found.union(*(step.features for step in block.steps))
