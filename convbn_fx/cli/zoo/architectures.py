"""From a model's name on the command line to the model and what to feed it.

`timm:NAME` and `torchvision:NAME` are architectures of those libraries, `package.module:factory` a function of the
user's own, looked for in the current directory too.
"""

import importlib
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convbn_fx.cli import Unusable
from convbn_fx.cli.zoo import results

#: How a model is named.
_NAMING = "give timm:NAME, torchvision:NAME or package.module:factory"


class UnknownModel(Unusable):
    """A name is not that of a model, or of a suite of them; the message says what it could be."""


@dataclass(frozen=True)
class Subject:
    """A model and its inputs.

    Attributes:
        name: The model's name on the command line.
        family: The module that its library keeps it in, such as `timm.resnet`.
        model: The model, in Eval mode.
        shape: Of an image; where nothing is known, the usual one.
        body: Name of the sub-module that the inputs are for; empty for the model itself. Detectors, whose
            post-processing depends on what they find, are measured at their backbone; optical flow, parts of which are
            float32 in any model, at the encoder that has the batch norms.
        examples: Inputs that the user's factory has given; they come before `shape`.
    """

    name: str
    family: str
    model: nn.Module
    shape: tuple[int, ...] = (3, 224, 224)
    body: str = ""
    examples: tuple[Any, ...] | None = None

    @property
    def resizable(self) -> bool:
        """Whether batch and size are to be chosen."""
        return self.examples is None

    def inputs(self, batch: int, side: int | None = None) -> tuple[Any, ...]:
        """A batch of images, as high and wide as told or as the model's own, that holds no memory; or the examples.

        It is float32, on the CPU, or on the meta device if that is the default.
        """
        if self.examples is not None:
            return self.examples
        shape = self.shape if side is None else (*self.shape[:-2], side, side)
        return (torch.empty(()).expand(batch, *shape),)

    def describe(self, inputs: tuple[Any, ...]) -> str:
        """The inputs in words, such as `2x3x224x224` or `backbone 2x3x800x1333`."""
        shapes = " ".join("x".join(map(str, each.shape)) for each in inputs if isinstance(each, Tensor))
        return f"{self.body} {shapes}".strip()


def load(name: str, *, pretrained: bool = False, built_for: int | None = None) -> Subject:
    """Builds a model by its name.

    Args:
        name: `timm:NAME`, `torchvision:NAME` or `package.module:factory`. A factory is called without arguments, and
            returns a model, or a model and a tuple of its inputs.
        pretrained: Load the library's trained weights, which are downloaded unless they are there; a factory is
            called with `pretrained=True`.
        built_for: Height and width of other images than its own that a model of timm's is built for.

    Returns:
        The model in Eval mode, with its inputs.

    Raises:
        UnknownModel: There is no such model or factory, or it makes something else.
        TypeError: The model cannot be built for other images.
    """
    library, separator, rest = name.partition(":")
    if not (separator and rest and library):
        raise UnknownModel(f"{name!r} is no model's name; {_NAMING}")
    build = _LIBRARIES.get(library, _own)
    if built_for is None:
        return build(name, rest, pretrained)
    if build is not _timm:
        raise TypeError(f"{name} is not built for images of any one size")
    return _timm(name, rest, pretrained, img_size=built_for)


def _timm(name: str, architecture: str, pretrained: bool, **options: int) -> Subject:
    timm = _library("timm")
    if not timm.is_model(architecture):
        raise UnknownModel(_unknown(name, architecture, timm.list_models()))
    model = timm.create_model(architecture, pretrained=pretrained, **options).eval()
    module = timm.model_entrypoint(architecture).__module__.rpartition(".")[2]
    return Subject(name, f"timm.{module}", model, tuple(model.default_cfg["input_size"]))


def _torchvision(name: str, architecture: str, pretrained: bool) -> Subject:
    torchvision = _library("torchvision")
    if architecture not in torchvision.models.list_models():
        raise UnknownModel(_unknown(name, architecture, torchvision.models.list_models()))
    builder = torchvision.models.get_model_builder(architecture)
    package, _, module = builder.__module__.removeprefix("torchvision.models.").rpartition(".")
    # A backbone is trained apart and would be downloaded, too.
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if not pretrained and package in {"detection", "segmentation"}:
        options["weights_backbone"] = None
    if not pretrained and architecture in {"googlenet", "inception_v3"}:
        options["init_weights"] = True
    model = builder(**options).eval()
    body = {"detection": "backbone", "optical_flow": "context_encoder"}.get(package, "")
    shape = _torchvision_shape(torchvision, architecture, package, model)
    return Subject(name, f"torchvision.{module}", model, shape, body)


def _torchvision_shape(torchvision: Any, architecture: str, package: str, model: Any) -> tuple[int, ...]:
    """What the model was made for, as its trained weights tell it."""
    if package == "detection":
        resize = model.transform
        return (3, *(resize.fixed_size or (resize.min_size[-1], resize.max_size)))
    if package == "optical_flow":
        return (3, 520, 960)
    weights = torchvision.models.get_model_weights(architecture).DEFAULT
    transforms = weights.transforms()
    side = getattr(transforms, "crop_size", None) or transforms.resize_size
    if hasattr(model, "image_size"):
        side = [model.image_size]  # a vision transformer takes no other, whatever its weights were made for
    frames = [weights.meta.get("min_temporal_size", 16)] if package == "video" else []
    return (3, *frames, side[0], side[-1])


def _own(name: str, factory: str, pretrained: bool) -> Subject:
    module = name.partition(":")[0]
    build = _factory(name, module, factory)
    made = build(pretrained=True) if pretrained else build()
    model, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        wanted = "it has to return a torch.nn.Module, or one and a tuple of its inputs"
        raise UnknownModel(f"{name}: the factory made a {type(made).__name__}; {wanted}")
    if examples is not None and not isinstance(examples, tuple):
        examples = (examples,)
    return Subject(name, module, model.eval(), examples=examples)


def _factory(name: str, module: str, factory: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # a console script's path begins with its own folder
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the user's module needs is missing
        message = f"{name}: there is no module {error.name!r}, here or installed; {_NAMING}"
        raise UnknownModel(message) from None
    try:
        made: Any = operator.attrgetter(factory)(found)
    except AttributeError:
        raise UnknownModel(f"{name}: {module} has no {factory!r}") from None
    if not callable(made) or isinstance(made, nn.Module):
        made_of = type(made).__name__
        raise UnknownModel(f"{name}: {factory} is a {made_of}; name a function that makes the model")
    return made


_LIBRARIES: Mapping[str, Callable[[str, str, bool], Subject]] = {"timm": _timm, "torchvision": _torchvision}


def of_library(name: str) -> bool:
    """Whether a model is a library's and not a user's own."""
    return name.partition(":")[0] in _LIBRARIES


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed; it comes with: pip install 'convbn-fx[zoo]'"
        raise UnknownModel(message) from None


def _unknown(name: str, architecture: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(architecture, list(known), n=5, cutoff=0.5)
    return f"there is no model {name}" + (f"; did you mean {', '.join(close)}?" if close else "")


# --- Many names at once -------------------------------------------------------------------------------------------


def suite(name: str) -> list[str]:
    """The names of a suite's models, in order.

    A suite is `timm`, `torchvision` (all but its quantised ones, which hold no batch norm), or a file: a results file,
    whose models are meant, or a text with one model's name a line; `#` begins a comment.

    Raises:
        UnknownModel: It is none of these, the library is not installed, or the file holds no name.
    """
    if name == "timm":
        return [f"timm:{model}" for model in _library("timm").list_models()]
    if name == "torchvision":
        models = _library("torchvision").models.list_models()
        return [f"torchvision:{model}" for model in models if not model.startswith("quantized_")]
    path = Path(name)
    if path.suffix == ".csv":
        names = [row.name for row in results.read(path)]
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            message = f"no suite {name!r}: give timm, torchvision, or a file of models' names ({error})"
            raise UnknownModel(message) from None
        names = [" ".join(line.partition("#")[0].split()) for line in lines]
    if not any(names):
        raise UnknownModel(f"{name}: no model is named there; write one a line, such as timm:resnet50")
    return list(dict.fromkeys(name for name in names if name))
