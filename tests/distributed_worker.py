"""What `test_distributed.py` launches with torchrun: each case runs on every rank, in a process group of its own.

A case builds the same model twice, tunes one of the two, puts both under the same engine and compares them. The
results, one file per rank, map the name of a case to None or to a traceback.
"""

import copy
import json
import os
import sys
import time
import traceback
import warnings
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import data
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import convbn_fx
from convbn_fx.kinds import resembles_batch_norm
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import randomize_batchnorms

DDP = DistributedDataParallel

RELATIVE_TOLERANCE = 1e-9

#: The cases by group and name; a case is called with the rank.
CASES = {}


def case(group, name, *args, **kwargs):
    """Registers a function as a case, to be called with the rank and these arguments."""

    def register(function):
        assert name not in CASES.setdefault(group, {})
        CASES[group][name] = partial(function, *args, **kwargs)
        return function

    return register


# --- Models -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block: 2 pairs, and 1 in the shortcut of a block that changes the number of channels."""

    def __init__(self, channels_in, channels_out, activation=nn.ReLU):
        super().__init__()
        stride = 1 if channels_in == channels_out else 2
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.act = activation(inplace=True)
        self.shortcut = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x):
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(y + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual network with dropout, whose blocks its own forward can checkpoint.

    Its activations are saved in each of the ways there are: their input, their output, as PyTorch does.
    """

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([Block(4, 4, nn.SiLU), Block(4, 8, nn.ReLU6), Block(8, 8)])
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else self.checkpointed(block, x)
        return self.head(self.dropout(x.mean([2, 3])))

    def checkpointed(self, block, x):
        return checkpoint(block, x, use_reentrant=self.use_reentrant)


RESNET_PAIRS = 8


class Branches(nn.Module):
    """The stem, and two branches of which a call runs one or both."""

    def __init__(self, by_rank=False):
        super().__init__()
        self.by_rank = by_rank
        self.stem = stem()
        self.always = pair(4, 4)
        self.rarely = pair(4, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.always(x)
        return y + self.rarely(x) if self.by_rank and dist.get_rank() == 0 else y


BRANCHES_PAIRS = 3


class Recurrent(nn.Module):
    """Runs one pair three times."""

    def __init__(self):
        super().__init__()
        self.stem = stem()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = self.norm(self.conv(x)).relu()
        return x


RECURRENT_PAIRS = 2


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def pair(channels_in, channels_out):
    return named(
        conv=nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), norm=nn.BatchNorm2d(channels_out)
    )


def stem():
    return named(pair=pair(3, 4), act=nn.ReLU())


def ends_with_conv():
    """`part` ends with the convolution of a pair whose batch norm comes after it."""
    part = named(inner=pair(4, 4), act=nn.ReLU(), conv=nn.Conv2d(4, 4, 3, padding=1))
    return named(stem=stem(), part=part, norm=nn.BatchNorm2d(4), act=nn.ReLU(), head=nn.Conv2d(4, 2, 1))


def begins_with_norm():
    """`part` begins with the batch norm of a pair whose convolution comes before it."""
    part = named(norm=nn.BatchNorm2d(4), act=nn.ReLU(), inner=pair(4, 4))
    return named(
        stem=stem(), conv=nn.Conv2d(4, 4, 3, padding=1), part=part, act=nn.ReLU(), head=nn.Conv2d(4, 2, 1)
    )


CROSSED_PAIRS = 3


def resnet18():
    import torchvision

    return torchvision.models.resnet18(num_classes=5)


RESNET18_PAIRS = 20


def built(build):
    """In Train mode but for the batch norms, whose statistics and affine parameters hide no mistake."""
    torch.manual_seed(0)
    return with_frozen_statistics(randomize_batchnorms(build().double()).train())


def with_frozen_statistics(model):
    for module in model.modules():
        if resembles_batch_norm(module):
            module.eval()
    return model


def tuned(model, pairs):
    """The model after `tune`, which must have fused so many pairs."""
    result = convbn_fx.tune(model)
    assert len(convbn_fx.report(result).fused) == pairs, str(convbn_fx.report(result))
    return result


def input_of(rank, step=0, shape=(2, 3, 12, 12)):
    return data(*shape, seed=10 * step + rank)


# --- Comparisons --------------------------------------------------------------------------------------------------


def original_name(name):
    """A parameter's or buffer's name without what wrappers put into it."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "").replace(".module.", ".")


def full(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def gradients(model):
    return {
        f"gradient of {original_name(name)}": None if p.grad is None else full(p.grad)
        for name, p in model.named_parameters()
    }


def state(model):
    values = [*model.named_parameters(), *model.named_buffers()]
    return {original_name(name): full(value) for name, value in values}


def differences(expected, actual):
    """What differs by more than the tolerance, relative to the largest magnitude of the tensor expected."""
    if expected.keys() != actual.keys():
        yield f"names differ: {sorted(expected.keys() ^ actual.keys())}"
    for name in [name for name in expected if name in actual]:
        wanted, found = expected[name], actual[name]
        if (wanted is None) != (found is None):
            yield f"{name}: {'expected none' if wanted is None else 'there is none'}"
        elif wanted is not None:
            if wanted.shape != found.shape or wanted.dtype != found.dtype:
                yield f"{name}: {wanted.dtype}{wanted.shape} != {found.dtype}{found.shape}"
            elif not wanted.isfinite().all():
                yield f"{name}: the reference itself is not finite"
            else:
                error = (wanted - found).abs().max().item()
                if not error <= RELATIVE_TOLERANCE * wanted.abs().max().item():
                    yield f"{name}: off by {error:.1e} of {wanted.abs().max().item():.1e}"


def assert_same(expected, actual):
    found = list(differences(expected, actual))
    assert not found, "\n".join([f"{len(found)} differences", *found[:20]])


def loss_of(output):
    return output.sin().mean()


def step_once(engine, *inputs, synchronise=lambda engine, is_last: nullcontext()):
    """Outputs, gradients and state after forward and backward for each input; gradients accumulate."""
    found = {}
    for position, x in enumerate(inputs):
        with synchronise(engine, position == len(inputs) - 1):
            torch.manual_seed(position)
            output = engine(x)
            loss_of(output).backward()
            found[f"output {position}"] = output.detach()
    return found | gradients(engine) | state(engine)


def train(engine, batches, **options):
    """As `step_once` for every step, with SGD in between; a step is a list of inputs."""
    optimizer = torch.optim.SGD(engine.parameters(), 0.1, momentum=0.9)
    found = {}
    for position, inputs in enumerate(batches):
        optimizer.zero_grad()
        record = step_once(engine, *inputs, **options)
        found |= {f"step {position}: {name}": value for name, value in record.items()}
        optimizer.step()
    return found


def assert_has_gradients(found, without=()):
    """The reference is no trivial one: every gradient that is expected is there and not zero."""
    missing = {
        name.partition("gradient of ")[2]
        for name, value in found.items()
        if "gradient of" in name and (value is None or not value.any())
    }
    assert missing == set(without), missing


def compare(
    rank, build, pairs, engine, *, steps=2, prepare=None, after_tune=None, shape=(2, 3, 12, 12), **options
):
    """Trains model and tuned model under the same engine, and compares all that there is to see."""
    found = []
    for is_tuned in (False, True):
        model = built(build)
        if prepare is not None:
            prepare(model)
        if is_tuned:
            model = tuned(model, pairs)
        if after_tune is not None:
            after_tune(model)
        batches = [[input_of(rank, step, shape)] for step in range(steps)]
        found.append(train(engine(model), batches, **options))
    expected, actual = found
    assert any("gradient of" in name and value is not None for name, value in expected.items())
    assert_same(expected, actual)
    return expected


@contextmanager
def counted_batch_norms():
    """Counts the calls of `F.batch_norm`, also those that recompute in a backward pass."""
    with mock.patch.object(F, "batch_norm", wraps=F.batch_norm) as batch_norm:
        yield batch_norm


def batch_norms_called(model, x):
    with counted_batch_norms() as batch_norm:
        model(x)
    return batch_norm.call_count


# --- DistributedDataParallel --------------------------------------------------------------------------------------


@case("ddp", "small network")
@case("ddp", "static graph", steps=3, static_graph=True)
@case("ddp", "gradients are views of buckets", gradient_as_bucket_view=True)
@case("ddp", "small buckets", bucket_cap_mb=0.0005)
@case("ddp", "finds that none is unused", find_unused_parameters=True)
@case("ddp", "without broadcast of buffers", broadcast_buffers=False)
def ddp(rank, steps=2, **options):
    expected = compare(rank, ResNet, RESNET_PAIRS, partial(DDP, **options), steps=steps)
    assert_has_gradients(expected)


@case("ddp", "torchvision resnet18")
def ddp_resnet18(rank):
    expected = compare(rank, resnet18, RESNET18_PAIRS, DDP, steps=1, shape=(1, 3, 64, 64))
    assert_has_gradients(expected)


@case("ddp", "gradients are the mean over the ranks")
def ddp_equals_one_process(rank):
    """The reference of the other cases is itself compared with something that knows of no engine."""
    engine = DDP(tuned(built(stem), 1))
    actual = step_once(engine, input_of(rank))
    model = built(stem)
    for other in range(dist.get_world_size()):
        (loss_of(model(input_of(other))) / dist.get_world_size()).backward()
    assert_same(gradients(model), {name: value for name, value in actual.items() if "gradient" in name})


#: What is taken out of the training, as a question of a parameter's name.
CONVOLUTIONS = ("conv.weight", "blocks.0.conv2.weight", "blocks.1.shortcut.0.weight")
GAMMAS = ("blocks.0.norm1.weight", "blocks.0.norm2.weight", "blocks.2.norm2.weight")
BETAS = ("norm.bias", "blocks.0.norm2.bias")
FROZEN = {
    "frozen convolutions": lambda name: name in CONVOLUTIONS,
    "frozen gammas": lambda name: name in GAMMAS,
    "frozen convolutions, gammas and betas": lambda name: name in CONVOLUTIONS + GAMMAS + BETAS,
    "all frozen but gammas": lambda name: "norm" not in name or name.endswith("bias"),
    "all frozen but the last block": lambda name: not name.startswith(("blocks.2", "head")),
}


def frozen(rank, is_frozen, engine):
    def prepare(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_frozen(name))

    expected = compare(rank, ResNet, RESNET_PAIRS, engine, prepare=prepare)
    assert_has_gradients(expected, [name for name, _ in ResNet().named_parameters() if is_frozen(name)])


for name, is_frozen in FROZEN.items():
    case("ddp", name, is_frozen=is_frozen, engine=DDP)(frozen)
    engine = partial(DDP, static_graph=True)
    case("ddp", f"{name}, static graph", is_frozen=is_frozen, engine=engine)(frozen)


@case("ddp", "a branch is unused")
def ddp_unused(rank):
    engine = partial(DDP, find_unused_parameters=True)
    expected = compare(rank, Branches, BRANCHES_PAIRS, engine, steps=3)
    assert_has_gradients(expected, [name for name, _ in Branches().named_parameters() if "rarely" in name])


@case("ddp", "a branch is unused, and the graph is static")
def ddp_unused_static(rank):
    expected = compare(rank, Branches, BRANCHES_PAIRS, partial(DDP, static_graph=True), steps=3)
    assert_has_gradients(expected, [name for name, _ in Branches().named_parameters() if "rarely" in name])


@case("ddp", "a branch is used by one rank")
def ddp_used_by_one_rank(rank):
    build = partial(Branches, by_rank=True)
    expected = compare(rank, build, BRANCHES_PAIRS, partial(DDP, find_unused_parameters=True), steps=3)
    assert_has_gradients(expected)


@case("ddp", "a pair runs three times")
@case("ddp", "a pair runs three times, static graph", static_graph=True)
def ddp_recurrent(rank, **options):
    assert_has_gradients(compare(rank, Recurrent, RECURRENT_PAIRS, partial(DDP, **options), steps=3))


@case("ddp", "accumulation under no_sync")
@case("ddp", "accumulation under no_sync, views of buckets", gradient_as_bucket_view=True)
def ddp_no_sync(rank, **options):
    found = []
    batches = [[input_of(rank, 3 * step + part) for part in range(3)] for step in range(2)]

    def synchronise(engine, is_last):
        return nullcontext() if is_last else engine.no_sync()

    for tune in (False, True):
        model = built(ResNet)
        engine = DDP(tuned(model, RESNET_PAIRS) if tune else model, **options)
        found.append(train(engine, batches, synchronise=synchronise))
    assert_has_gradients(found[0])
    assert_same(*found)


@case("ddp", "each rank has a batch of its own size")
def ddp_uneven(rank):
    """So the ranks may run a pair in different forms."""
    shape = ((3, 3, 17, 13), (1, 3, 4, 4))[rank]
    assert_has_gradients(compare(rank, ResNet, RESNET_PAIRS, DDP, shape=shape))


@case("ddp", "two forward passes before the backward passes")
def ddp_two_forwards(rank):
    found = []
    for tune in (False, True):
        model = built(ResNet)
        engine = DDP(tuned(model, RESNET_PAIRS) if tune else model, broadcast_buffers=False)
        torch.manual_seed(0)
        with engine.no_sync():
            first = engine(input_of(rank))
        second = engine(input_of(rank, 1))
        loss_of(first + second).backward()
        found.append({"output": (first + second).detach()} | gradients(engine))
    assert_has_gradients(found[0])
    assert_same(*found)


@case("ddp", "batch norms switched to Train mode under way")
def ddp_modes(rank):
    found = []
    for tune in (False, True):
        model = built(ResNet)
        model = tuned(model, RESNET_PAIRS) if tune else model
        engine = DDP(model)
        record = {}
        for position, mode in enumerate((False, True, False)):
            model.blocks[1].norm1.train(mode)
            model.blocks[2].norm2.train(mode)
            engine.zero_grad()
            results = step_once(engine, input_of(rank, position))
            record |= {f"{position} {name}": value for name, value in results.items()}
        found.append(record)
    assert found[0]["2 blocks.1.norm1.num_batches_tracked"] == 1
    assert_same(*found)


@case("ddp", "only the part that ends with a convolution", ends_with_conv)
@case("ddp", "only the part that begins with a batch norm", begins_with_norm)
@case(
    "ddp",
    "only the part that ends with a convolution, finding unused",
    ends_with_conv,
    find_unused_parameters=True,
)
@case("ddp", "only the part that ends with a convolution, static graph", ends_with_conv, static_graph=True)
@case("ddp", "only the part that begins with a batch norm, static graph", begins_with_norm, static_graph=True)
def ddp_of_a_part(build, rank, **options):
    """A pair crosses the border of what the engine wraps."""

    def engine(model):
        model.part = DDP(model.part, **options)
        return model

    expected = compare(rank, build, CROSSED_PAIRS, engine, steps=3)
    assert_has_gradients(expected)


class Unchanged(torch.autograd.Function):
    """Stands for SyncBatchNorm's own function, for which it takes a GPU."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class CustomBatchNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(Unchanged.apply(x))


@case("ddp", "batch norms exchanged for modules that call an autograd function")
def ddp_custom_function(rank):
    """As `convert_sync_batchnorm` exchanges them, for modules that in Train mode call an autograd function."""

    def after_tune(model):
        for block in model.blocks:
            block.norm1 = CustomBatchNorm(block.norm1)

    assert_has_gradients(compare(rank, ResNet, RESNET_PAIRS, DDP, after_tune=after_tune))


# --- FSDP2 --------------------------------------------------------------------------------------------------------


def shard(model, parts=(), reshard_after_forward=True):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in parts:
        fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=reshard_after_forward)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)


BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
LAYERS = ("conv", "blocks.0.norm1", "blocks.1.conv2", "blocks.1.shortcut", "blocks.2.conv1", "blocks.2.norm1")
LAYOUTS = {
    "root": (),
    "blocks and root": BLOCKS,
    "layers, blocks and root": (*LAYERS, *BLOCKS),
}

for name, parts in LAYOUTS.items():

    @case("fsdp2", name, parts)
    def fsdp(parts, rank, **options):
        engine = partial(shard, parts=parts, **options)
        assert_has_gradients(compare(rank, ResNet, RESNET_PAIRS, engine, steps=3))


case("fsdp2", "blocks and root, not resharded", BLOCKS, reshard_after_forward=False)(fsdp)


@case("fsdp2", "torchvision resnet18, layers and root")
def fsdp_resnet18(rank):
    engine = partial(shard, parts=("layer1", "layer2", "layer3.0", "layer3.1", "layer4"))
    expected = compare(rank, resnet18, RESNET18_PAIRS, engine, steps=1, shape=(1, 3, 64, 64))
    assert_has_gradients(expected)


for name, is_frozen in FROZEN.items():
    case("fsdp2", name, is_frozen=is_frozen, engine=partial(shard, parts=BLOCKS))(frozen)


@case("fsdp2", "accumulation without synchronisation")
def fsdp_accumulation(rank):
    @contextmanager
    def synchronise(engine, is_last):
        engine.set_requires_gradient_sync(is_last)
        yield

    found = []
    batches = [[input_of(rank, 3 * step + part) for part in range(3)] for step in range(2)]
    for tune in (False, True):
        model = built(ResNet)
        engine = shard(tuned(model, RESNET_PAIRS) if tune else model, BLOCKS)
        found.append(train(engine, batches, synchronise=synchronise))
    assert_has_gradients(found[0])
    assert_same(*found)


CROSSED = {"part ends with a convolution": ends_with_conv, "part begins with a batch norm": begins_with_norm}

for name, build in CROSSED.items():

    @case("fsdp2", f"a sharded {name}", build, ("part",))
    @case("fsdp2", f"a sharded model whose {name}", build, ())
    def fsdp_crossed(build, parts, rank):
        expected = compare(rank, build, CROSSED_PAIRS, partial(shard, parts=parts), steps=3)
        assert_has_gradients(expected)


def assert_same_without_gradients(rank, build, pairs, engine):
    found = []
    for tune in (False, True):
        model = built(build).eval()
        wrapped = engine(tuned(model, pairs) if tune else model)
        with torch.no_grad():
            found.append({f"output {step}": wrapped(input_of(rank, step)) for step in range(2)})
    assert_same(*found)


@case("fsdp2", "without gradients")
def fsdp_no_grad(rank):
    assert_same_without_gradients(rank, ResNet, RESNET_PAIRS, partial(shard, parts=BLOCKS))


for name, build in CROSSED.items():

    @case("fsdp2", f"without gradients, a sharded {name}", build)
    def fsdp_crossed_no_grad(build, rank):
        assert_same_without_gradients(rank, build, CROSSED_PAIRS, partial(shard, parts=("part",)))


def checkpointed_and_sharded(model, parts, sharded=True):
    """The usual recipe: wrappers for checkpointing first, and the wrappers sharded."""
    for name in parts:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, checkpoint_wrapper(model.get_submodule(name)))
    return shard(model, parts if sharded else ())


@case("fsdp2", "checkpointed blocks")
def fsdp_checkpointed(rank):
    engine = partial(checkpointed_and_sharded, parts=BLOCKS)
    assert_has_gradients(compare(rank, ResNet, RESNET_PAIRS, engine, steps=3))


for name, build in CROSSED.items():

    @case("fsdp2", f"a sharded and checkpointed {name}", build)
    @case("fsdp2", f"a checkpointed {name}, and the root is sharded", build, sharded=False)
    def fsdp_crossed_checkpointed(build, rank, **options):
        engine = partial(checkpointed_and_sharded, parts=("part",), **options)
        assert_has_gradients(compare(rank, build, CROSSED_PAIRS, engine, steps=3))

    @case("fsdp2", f"without gradients, a sharded and checkpointed {name}", build)
    def fsdp_crossed_checkpointed_no_grad(build, rank):
        engine = partial(checkpointed_and_sharded, parts=("part",))
        assert_same_without_gradients(rank, build, CROSSED_PAIRS, engine)


# --- SyncBatchNorm ------------------------------------------------------------------------------------------------


def converted(model):
    """The model with SyncBatchNorms, which are in the mode of those before."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def ddp_on_cpu(model):
    """DDP takes no SyncBatchNorm on a CPU, where it cannot run in Train mode; in Eval mode it can."""
    with mock.patch.object(DDP, "_passing_sync_batchnorm_handle"):
        return DDP(model)


SYNC_ENGINES = {"DDP": ddp_on_cpu, "FSDP2": partial(shard, parts=BLOCKS), "no engine": lambda model: model}

for name, engine in SYNC_ENGINES.items():

    @case("sync_batch_norm", f"converted before tune, {name}", engine)
    def sync_before(engine, rank):
        expected = compare(rank, lambda: converted(ResNet()), RESNET_PAIRS, engine)
        assert_has_gradients(expected)

    @case("sync_batch_norm", f"the tuned model converted, {name}", engine)
    def sync_after(engine, rank):
        expected = compare(rank, ResNet, RESNET_PAIRS, lambda model: engine(converted(model)))
        assert_has_gradients(expected)


@case("sync_batch_norm", "the model under DDP converted")
def sync_under_ddp(rank):
    def engine(model):
        wrapped = DDP(model)
        assert converted(wrapped) is wrapped
        return wrapped

    assert_has_gradients(compare(rank, ResNet, RESNET_PAIRS, engine))


@case("sync_batch_norm", "DDP refuses both on a CPU")
def sync_refused(rank):
    model = converted(built(ResNet))
    messages = []
    for candidate in (model, tuned(model, RESNET_PAIRS), converted(tuned(built(ResNet), RESNET_PAIRS))):
        try:
            DDP(candidate)
        except ValueError as error:
            messages.append(str(error))
    assert messages == 3 * ["SyncBatchNorm layers only work with GPU modules"]


@case("sync_batch_norm", "the tuned model converted has the same state")
def sync_state(rank):
    model = built(ResNet)
    candidate = converted(tuned(model, RESNET_PAIRS))
    assert {type(m) for m in candidate.modules() if resembles_batch_norm(m)} == {nn.SyncBatchNorm}
    assert candidate.state_dict().keys() == model.state_dict().keys()
    assert_same(state(model), state(candidate))


def sync_outcomes(build_engine, rank):
    """The outcome of a call, of one with a batch norm in Train mode, and of one after that."""
    engine, norm = build_engine()
    outcomes = []
    for position, mode in enumerate((False, True, False)):
        norm.train(mode)
        engine.zero_grad()
        try:
            outcomes.append(step_once(engine, input_of(rank, position)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the tuned model is to raise the same
            outcomes.append((type(error), str(error)))
    return outcomes


@case("sync_batch_norm", "switched to Train mode, converted before tune", True)
@case("sync_batch_norm", "switched to Train mode, the tuned model converted", False)
def sync_train_mode(convert_first, rank):
    """On a CPU it raises; the calls before and after do not."""

    def build_engine(tune):
        model = built(ResNet)
        model = converted(model) if convert_first else model
        model = tuned(model, RESNET_PAIRS) if tune else model
        model = model if convert_first else converted(model)
        return ddp_on_cpu(model), model.blocks[1].norm1

    expected, actual = (sync_outcomes(partial(build_engine, tune), rank) for tune in (False, True))
    assert [isinstance(wanted, tuple) for wanted in expected] == [False, True, False]
    for wanted, found in zip(expected, actual, strict=True):
        if isinstance(wanted, tuple):
            assert found == wanted
        else:
            assert not isinstance(found, tuple), found
            assert_same(wanted, found)


# --- Activation checkpointing -------------------------------------------------------------------------------------


@case("checkpointing", "in the forward, not reentrant", use_reentrant=False)
@case("checkpointing", "in the forward, not reentrant, static graph", use_reentrant=False, static_graph=True)
@case("checkpointing", "in the forward, reentrant", use_reentrant=True)
@case("checkpointing", "in the forward, reentrant, static graph", use_reentrant=True, static_graph=True)
def checkpointing_in_forward(rank, use_reentrant, **options):
    build = partial(ResNet, use_reentrant)
    assert_has_gradients(compare(rank, build, RESNET_PAIRS, partial(DDP, **options), steps=3))


IMPLEMENTATIONS = {"not reentrant": CheckpointImpl.NO_REENTRANT, "reentrant": CheckpointImpl.REENTRANT}

for name, implementation in IMPLEMENTATIONS.items():

    @case("checkpointing", f"wrappers around blocks, {name}", implementation)
    def wrapped_blocks(implementation, rank):
        def after_tune(model):
            for position, block in enumerate(model.blocks):
                model.blocks[position] = checkpoint_wrapper(block, checkpoint_impl=implementation)

        assert_has_gradients(compare(rank, ResNet, RESNET_PAIRS, DDP, after_tune=after_tune))

    def apply_to(check, implementation):
        wrapper = partial(checkpoint_wrapper, checkpoint_impl=implementation)
        return partial(apply_activation_checkpointing, checkpoint_wrapper_fn=wrapper, check_fn=check)

    @case("checkpointing", f"applied to blocks, {name}", implementation)
    @case("checkpointing", f"applied to blocks before tune, {name}", implementation, before=True)
    def applied(implementation, rank, before=False):
        apply = apply_to(lambda module: isinstance(module, Block), implementation)
        kwargs = {"prepare": apply} if before else {"after_tune": apply}
        expected = compare(rank, ResNet, RESNET_PAIRS, DDP, **kwargs)
        assert_has_gradients(expected)

    @case("checkpointing", f"applied to batch norms, {name}", implementation)
    def applied_to_norms(implementation, rank):
        apply = apply_to(lambda module: isinstance(module, nn.BatchNorm2d), implementation)
        assert_has_gradients(compare(rank, ResNet, RESNET_PAIRS, DDP, after_tune=apply))

    @case("checkpointing", f"applied to convolutions, {name}", implementation)
    def applied_to_convolutions(implementation, rank):
        def is_inner(module):
            return isinstance(module, nn.Conv2d) and module.in_channels > 3

        expected = compare(rank, ResNet, RESNET_PAIRS, DDP, after_tune=apply_to(is_inner, implementation))
        assert_has_gradients(expected)

    for crossed, build in CROSSED.items():

        @case("checkpointing", f"a wrapped {crossed}, {name}", build, implementation)
        def wrapped_part(build, implementation, rank):
            def after_tune(model):
                model.part = checkpoint_wrapper(model.part, checkpoint_impl=implementation)

            assert_has_gradients(compare(rank, build, CROSSED_PAIRS, DDP, after_tune=after_tune))


# --- Checkpoints --------------------------------------------------------------------------------------------------


def shared_folder(rank):
    """A folder that both ranks know."""
    folder = [Path(os.environ["CONVBN_FX_FOLDER"]) / f"{time.time_ns()}" if rank == 0 else None]
    dist.broadcast_object_list(folder)
    folder[0].mkdir(exist_ok=True)
    return folder[0]


def trained_a_step(engine, rank):
    train(engine, [[input_of(rank)]])
    return engine


def original():
    """The untouched model as it was before its training."""
    return built(ResNet)


@case("checkpoints", "saved by rank 0 from DDP, loaded into the original")
def checkpoint_of_ddp(rank):
    path = shared_folder(rank) / "checkpoint.pt"
    engine = trained_a_step(DDP(tuned(original(), RESNET_PAIRS)), rank)
    if rank == 0:
        torch.save({"bare": engine.module.state_dict(), "wrapped": engine.state_dict()}, path)
    dist.barrier()
    saved = torch.load(path, weights_only=True)
    expected = state(trained_a_step(DDP(original()), rank))
    for target, key in ((original(), "bare"), (DDP(original()), "wrapped")):
        assert list(differences(expected, state(target)))
        target.load_state_dict(saved[key], strict=True)
        assert_same(expected, state(target))


@case("checkpoints", "saved by rank 0 from the original, loaded into DDP")
def checkpoint_into_ddp(rank):
    path = shared_folder(rank) / "checkpoint.pt"
    source = trained_a_step(DDP(original()), rank)
    if rank == 0:
        torch.save(source.module.state_dict(), path)
    dist.barrier()
    engine = DDP(tuned(original(), RESNET_PAIRS))
    engine.module.load_state_dict(torch.load(path, weights_only=True), strict=True)
    source.zero_grad()
    assert_same(step_once(source, input_of(rank, 1)), step_once(engine, input_of(rank, 1)))


@case("checkpoints", "full state of FSDP2, loaded into the original")
def checkpoint_of_fsdp(rank):
    engine = trained_a_step(shard(tuned(original(), RESNET_PAIRS), BLOCKS), rank)
    full_state = get_model_state_dict(engine, options=StateDictOptions(full_state_dict=True))
    expected = state(trained_a_step(shard(original(), BLOCKS), rank))
    target = original()
    target.load_state_dict(full_state, strict=True)
    assert_same(expected, state(target))


@case("checkpoints", "full state of the original, loaded into FSDP2 from rank 0")
def checkpoint_into_fsdp(rank):
    source = built(ResNet)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    engine = shard(tuned(original(), RESNET_PAIRS), BLOCKS)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(engine, copy.deepcopy(source.state_dict()) if rank == 0 else {}, options=options)
    assert_same(state(source), state(engine))
    expected = step_once(shard(source, BLOCKS), input_of(rank, 1))
    assert_same(expected, step_once(engine, input_of(rank, 1)))


@case("checkpoints", "sharded checkpoint of FSDP2, loaded into the original under FSDP2")
def sharded_checkpoint(rank):
    folder = shared_folder(rank)
    engine = trained_a_step(shard(tuned(original(), RESNET_PAIRS), BLOCKS), rank)
    dcp.save({"model": get_model_state_dict(engine)}, checkpoint_id=folder)
    target = shard(original(), BLOCKS)
    loaded = {"model": get_model_state_dict(target)}
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(target, loaded["model"], options=StateDictOptions(strict=True))
    assert_same(state(engine), state(target))


# --- Tuning takes effect ------------------------------------------------------------------------------------------

LARGE = (2, 3, 32, 32)


@case("effect", "DDP runs no batch norm", engine=DDP)
@case("effect", "DDP with a static graph runs no batch norm", engine=partial(DDP, static_graph=True))
@case("effect", "FSDP2 of the root runs no batch norm", engine=shard)
@case("effect", "FSDP2 of blocks runs no batch norm", engine=partial(shard, parts=BLOCKS))
@case("effect", "SyncBatchNorm under FSDP2 runs no batch norm", engine=shard, convert=True)
def no_batch_norm_runs(rank, engine, convert=False):
    def build():
        return converted(ResNet()) if convert else ResNet()

    x = input_of(rank, shape=LARGE)
    untouched, candidate = engine(built(build)), engine(tuned(built(build), RESNET_PAIRS))
    assert batch_norms_called(untouched, x) == RESNET_PAIRS
    assert batch_norms_called(candidate, x) == 0
    assert len(convbn_fx.report(candidate).fused) == RESNET_PAIRS


@case("effect", "checkpointed blocks run no batch norm, forward and backward")
def no_batch_norm_runs_in_checkpoints(rank):
    for tune in (False, True):
        model = built(partial(ResNet, use_reentrant=False))
        engine = DDP(tuned(model, RESNET_PAIRS) if tune else model)
        with counted_batch_norms() as batch_norm:
            loss_of(engine(input_of(rank, shape=LARGE))).backward()
        assert batch_norm.call_count == 0 if tune else batch_norm.call_count > RESNET_PAIRS


@case("effect", "a pair that crosses the border of a sharded part runs apart, the others do not")
def crossed_pair_runs_apart(rank):
    for build in CROSSED.values():
        untouched = shard(built(build), ("part",))
        candidate = shard(tuned(built(build), CROSSED_PAIRS), ("part",))
        x = input_of(rank, shape=LARGE)
        assert batch_norms_called(untouched, x) == CROSSED_PAIRS
        assert batch_norms_called(candidate, x) == 1


@case("effect", "DDP saves less")
def ddp_saves_less(rank):
    x = input_of(rank, shape=LARGE)
    untouched, candidate = DDP(built(ResNet)), DDP(tuned(built(ResNet), RESNET_PAIRS))
    assert saved_bytes(candidate, x) < 0.7 * saved_bytes(untouched, x)


@case("effect", "DDP of torchvision resnet18 saves less")
def ddp_resnet18_saves_less(rank):
    x = input_of(rank, shape=(2, 3, 128, 128))
    untouched, candidate = DDP(built(resnet18)), DDP(tuned(built(resnet18), RESNET18_PAIRS))
    assert saved_bytes(candidate, x) < 0.7 * saved_bytes(untouched, x)
    assert batch_norms_called(candidate, x) < batch_norms_called(untouched, x) == RESNET18_PAIRS


def activation_bytes(engine, x):
    """What autograd is handed to save, but for parameters, which FSDP2 gathers in storages of its own."""
    sizes = {}

    def pack(tensor):
        if tensor.ndim == 4 and tensor.shape[0] == x.shape[0] and tensor.shape[-1] >= x.shape[-1] // 4:
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return len(kept) - 1

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        engine(x)
    return sum(sizes.values())


@case("effect", "FSDP2 saves less", ())
@case("effect", "FSDP2 of blocks saves less", BLOCKS)
def fsdp_saves_less(parts, rank):
    x = input_of(rank, shape=LARGE)
    untouched = shard(built(ResNet), parts)
    candidate = shard(tuned(built(ResNet), RESNET_PAIRS), parts)
    assert activation_bytes(candidate, x) < 0.7 * activation_bytes(untouched, x)


# --- The launch ---------------------------------------------------------------------------------------------------


@contextmanager
def process_group(store, rank, world_size, name):
    """A failure ends the group, and so the other rank's waiting; the next case has a group of its own."""
    store = dist.PrefixStore(name, store)
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Its successor came with PyTorch 2.15.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        yield


def main(folder, names):
    """Runs the cases named, as `group: name`, and writes their outcomes after each."""
    torch.set_num_threads(1)
    os.environ["CONVBN_FX_FOLDER"] = folder
    store, rank, world_size = next(dist.rendezvous("env://"))
    cases = {f"{group}: {name}": run for group, runs in CASES.items() for name, run in runs.items()}
    outcomes = {}
    for name in names:
        start = time.perf_counter()
        try:
            with process_group(store, rank, world_size, name), warnings_are_errors():
                cases[name](rank)
            error = None
        except Exception:  # noqa: BLE001 - whatever it is, pytest shows it as the case's outcome
            error = traceback.format_exc()
        outcomes[name] = {"error": error, "seconds": time.perf_counter() - start}
        (Path(folder) / f"rank{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
