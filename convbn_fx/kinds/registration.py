"""Adding a class of one's own to the table."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from convbn_fx.kinds import classes
from convbn_fx.kinds.classes import Classes, defined
from convbn_fx.kinds.rows import ActivationKind, BatchNormKind, ConvolutionKind, Row
from convbn_fx.operands import Activation, BatchNorm, Convolution


def register_conv(
    cls: type[nn.Module],
    *,
    like: type[nn.Module] | None = None,
    operands: Callable[..., tuple[Tensor, Convolution]] | None = None,
) -> None:
    """Adds a convolution class to the table, for all later calls of the pass.

    By registering it you promise that calling the module equals calling the functional convolution that `operands`
    describes, for any weight and bias put in place of its own.

    Args:
        cls: The class itself; its subclasses are not meant.
        like: A class in the table whose forward `cls` computes, from the same attributes. By default the nearest
            base class of `cls` in the table, if `cls` leaves its forward as it is.
        operands: Instead of `like`: given the module and the arguments of its call, returns the input tensor (padded
            or reshaped as the forward does, batch first) and the [`Convolution`][convbn_fx.operands.Convolution].

    Raises:
        TypeError: `cls` is no `torch.nn.Module` class, or nothing tells what its forward computes, or `cls` has not
            the attributes that `like` has.

    Example:
        ```python
        import torch
        import torch.nn.functional as F
        import convbn_fx
        from convbn_fx.operands import Convolution

        class PaddedConv(torch.nn.Conv2d):  # its forward pads on the right, then convolves
            def forward(self, input):
                return super().forward(F.pad(input, (0, 1, 0, 1)))

        def operands(module, input):
            return F.pad(input, (0, 1, 0, 1)), Convolution("conv2d", module.weight, module.bias, module.stride)

        convbn_fx.register_conv(PaddedConv, operands=operands)
        model = torch.nn.Sequential(PaddedConv(3, 8, 2), torch.nn.BatchNorm2d(8)).eval()
        tuned = convbn_fx.tune(model)
        assert len(convbn_fx.report(tuned).fused) == 1
        torch.testing.assert_close(tuned(x := torch.randn(2, 3, 8, 8)), model(x))
        ```
    """
    if operands is not None and like is None and _is_module_class(cls):
        row = ConvolutionKind(cls.__name__, operands)
    else:
        row = _row_like(cls, like, classes.CONVOLUTION_CLASSES, "register_conv")
    classes.CONVOLUTION_CLASSES.enter(cls, row)


def register_batch_norm(
    cls: type[nn.Module],
    *,
    like: type[nn.Module] | None = None,
    operands: Callable[[Any], BatchNorm] | None = None,
    always_frozen: bool | None = None,
) -> None:
    """Adds a batch-norm class to the table, for all later calls of the pass.

    By registering it you promise that in Eval mode (`module.training` False) calling the module equals
    `F.batch_norm` with the operands and frozen statistics, and nothing more (no activation).

    Args:
        cls: The class itself; its subclasses are not meant.
        like: A class in the table whose forward `cls` computes, from the same attributes. By default the nearest
            base class of `cls` in the table, if `cls` leaves its forward as it is.
        operands: Instead of `like`: given the module, returns its [`BatchNorm`][convbn_fx.operands.BatchNorm].
        always_frozen: Whether `cls` normalises by running statistics in Train mode too. By default as `like` does;
            False with `operands`.

    Raises:
        TypeError: `cls` is no `torch.nn.Module` class, or nothing tells what its forward computes, or `cls` has not
            the attributes that `like` has.

    Example:
        ```python
        import torch
        import convbn_fx

        class Checked(torch.nn.BatchNorm2d):  # looks at its input, and does what its base does
            def forward(self, input):
                assert input.is_floating_point()
                return super().forward(input)

        convbn_fx.register_batch_norm(Checked, like=torch.nn.BatchNorm2d)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), Checked(8)).eval()
        assert len(convbn_fx.report(convbn_fx.tune(model)).fused) == 1
        ```
    """
    if operands is not None and like is None and _is_module_class(cls):
        row = BatchNormKind(cls.__name__, operands, statistics=())
    else:
        row = _row_like(cls, like, classes.BATCH_NORM_CLASSES, "register_batch_norm")
    if always_frozen is not None:
        # Such a class most often multiplies and adds, and what it returns is of the type that comes out of that.
        row = replace(row, always_frozen=always_frozen, promotes=always_frozen)
    classes.BATCH_NORM_CLASSES.enter(cls, row)


def register_activation(
    cls: type[nn.Module],
    *,
    like: type[nn.Module] | None = None,
    operands: Callable[[Any], Activation | None] | None = None,
) -> None:
    """Adds an activation class to the table, for all later calls of `tune` and `transform`.

    By registering it you promise that calling the module computes that activation function, and nothing more.

    Args:
        cls: The class itself; its subclasses are not meant.
        like: A class in the table whose forward `cls` computes, from the same attributes. By default the nearest
            base class of `cls` in the table, if `cls` leaves its forward as it is.
        operands: Instead of `like`: given the module, returns its [`Activation`][convbn_fx.operands.Activation]; None
            where it is to run as it is.

    Raises:
        TypeError: `cls` is no `torch.nn.Module` class, or nothing tells what its forward computes, or `cls` has not
            the attributes that `like` has.

    Example:
        ```python
        import torch
        import convbn_fx
        from convbn_fx.operands import Activation

        class Swish(torch.nn.Module):
            def forward(self, x):
                return torch.nn.functional.silu(x)

        convbn_fx.register_activation(Swish, operands=lambda module: Activation("silu"))
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), Swish()).eval()
        assert [each.name for each in convbn_fx.report(convbn_fx.tune(model)).activations] == ["2"]
        ```
    """
    if operands is not None and like is None and _is_module_class(cls):
        row = ActivationKind(cls.__name__, operands)
    else:
        row = _row_like(cls, like, classes.ACTIVATION_CLASSES, "register_activation")
    classes.ACTIVATION_CLASSES.enter(cls, row)


def _is_module_class(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, nn.Module)


def _row_like(
    cls: type[nn.Module],
    like: type[nn.Module] | None,
    table: Classes[Row],
    function: str,
) -> Row:
    if not _is_module_class(cls):
        raise TypeError(f"{function}: expected a subclass of torch.nn.Module, got {cls!r}")
    candidates = cls.__mro__ if like is None else (like,)
    for candidate in candidates:
        row = table.row(candidate)
        if row is None:
            continue
        overridden = [] if row.methods is None else row.methods.overridden_in(cls)
        if like is None and overridden:
            raise TypeError(
                f"{function}: {cls.__qualname__} has its own {', '.join(overridden)}. Pass operands=... to say what it "
                f"computes, or like={candidate.__name__} if it computes the same"
            )
        if missing := _missing(cls, row.reads):
            raise TypeError(
                f"{function}: {cls.__qualname__} has no {', '.join(missing)}, which is read from a module like "
                f"{candidate.__name__}. Pass operands=... to say what it computes with instead"
            )
        return row
    known = ", ".join(known_cls.__name__ for known_cls in list(table.rows))
    raise TypeError(
        f"{function}: cannot tell what {cls.__qualname__} computes. Pass operands=..., or like= one of: {known}"
    )


def _missing(cls: type[nn.Module], attributes: tuple[str, ...]) -> list[str]:
    """Those of the attributes that its instances cannot have, as far as the class itself tells.

    One whose constructors name none of them gets them in a way that cannot be read here.
    """
    methods = [
        (name, value.__code__)
        for base in cls.__mro__
        if base not in nn.Module.__mro__
        for name, value in vars(base).items()
        if isinstance(value, FunctionType)
    ]
    named = {word for name, code in methods if name == "__init__" for word in _words(code)}
    if named.isdisjoint(attributes):
        return []
    known = defined(cls, nn.Module).union(*(_words(code) for _, code in methods))
    return [name for name in attributes if name not in known]


def _words(code: CodeType) -> Iterator[object]:
    """The names and the strings in a function's code."""
    yield from code.co_names
    for constant in code.co_consts:
        yield from constant if isinstance(constant, tuple) else (constant,)
