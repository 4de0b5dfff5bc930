"""What a model's pairs lie in besides plain blocks: across borders, behind references, in graphs."""

import functools
import weakref
from types import SimpleNamespace

import torch
from models import Residual, conv_norm, data, prepared
from torch import nn

import convbn_fx


class ConvLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x.sin())


class NormFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(x).relu()


class Chain(nn.Module):
    """Pairs that no single block holds, and a method beside forward."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 2)

    def forward_features(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward_head(self, x):
        return self.head(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


CROSSING = {
    "two blocks": lambda: Chain(ConvLast(), NormFirst()),
    "block and norm": lambda: Chain(ConvLast(), nn.BatchNorm2d(4)),
    "conv and block": lambda: Chain(nn.Conv2d(3, 4, 3), NormFirst()),
    "nested sequentials": lambda: Chain(
        nn.Sequential(nn.ReLU(), nn.Sequential(ConvLast())),
        nn.Sequential(nn.Sequential(NormFirst()), nn.ReLU()),
    ),
    "one sequential": lambda: Chain(nn.Sequential(nn.Sequential(ConvLast()), nn.Sequential(NormFirst()))),
    "plain layers": lambda: Chain(*conv_norm()),
}


class ByReference(nn.Module):
    """Reaches its parts by other ways than attributes of their names."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm = conv_norm()
        self.drop = nn.Dropout(0.5)
        parts = [self.conv, self.norm, self.drop]
        self.parts = {
            "list": parts,
            "tuple": tuple(parts),
            "dict": dict(enumerate(parts)),
            "namespace": SimpleNamespace(parts=parts),
            "bound method": [part.forward for part in parts],
            "partial": functools.partial(self.run, parts),
            "closure": lambda x: self.drop(self.norm(self.conv(x))),
            "weak reference": weakref.ref(self),
            "weak list": [weakref.ref(part) for part in parts],
            "weak dict": weakref.WeakValueDictionary(enumerate(parts)),
            "self": [self],
        }[way]
        self.way = way

    @staticmethod
    def run(parts, x):
        for part in parts:
            x = part(x)
        return x

    def forward(self, x):
        match self.way:
            case "dict" | "weak dict":
                return self.run([self.parts[i] for i in range(3)], x)
            case "namespace":
                return self.run(self.parts.parts, x)
            case "partial" | "closure":
                return self.parts(x)
            case "weak reference":
                return self.run([self.parts().conv, self.parts().norm, self.parts().drop], x)
            case "weak list":
                return self.run([part() for part in self.parts], x)
            case "self":
                return self.run(list(self.parts[0].children()), x)
        return self.run(self.parts, x)


#: By which ways.
WAYS = ["list", "tuple", "dict", "bound method", "partial", "closure", "weak reference", "weak list", "self"]


def traced_by_torch():
    return torch.fx.symbolic_trace(prepared(Residual(4)))


def transformed():
    return convbn_fx.transform(convbn_fx.symbolic_trace(prepared(Residual(4))))


def untransformed():
    return convbn_fx.symbolic_trace(prepared(Residual(4)))


def exported():
    return torch.export.export(prepared(Residual(4)), (data(2, 4, 6, 6),)).module()


def traced_block():
    return torch.fx.symbolic_trace(prepared(nn.Sequential(*conv_norm(4, 4), nn.Conv2d(4, 4, 1))))


GRAPHS = {traced_by_torch: 2, transformed: 2, untransformed: 2, exported: 2, traced_block: 1}
