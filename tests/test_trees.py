"""Properties of `tune`, `transform` and `deploy` on models that share, hide and inspect their modules."""

import contextlib
import copy
import io
import sys
import threading
import time
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, currently_in_test_context, find, given, note, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from trees import (
    ACTS,
    AROUND,
    CONDITIONS,
    CONVS,
    FLAT,
    FUNCTIONS,
    HELD,
    IN_PLACE,
    MOMENTUM,
    NORMS,
    PLAIN,
    READ_OF,
    Act,
    Add,
    Apply,
    Block,
    Branch,
    Child,
    Conv,
    Features,
    Function,
    Momentum,
    Norm,
    Read,
    Tree,
    Weight,
    features_of,
    trees,
)

import convbn_fx

#: Where Python asks nobody what a value is, a trace bakes in one way, as docs/limits.md says.
TRACED = Features().without(
    conditions=["option", "keyword", "dtype is", "grad mode"],
    around=[name for name in AROUND if name.startswith("one by")],
)


# --- What a user does --------------------------------------------------------------------------------------------


def ways(tree):
    """The ways in which users call the model, by name: with each of its options, twice, and its public methods."""
    root = tree.root
    found = {
        "forward": lambda model, x: model(x),
        "twice": lambda model, x: [model(x), model(2 * x)],
        "no_grad": torch.no_grad()(lambda model, x: model(x)),
        "inference_mode": torch.inference_mode()(lambda model, x: model(x)),
    }
    if "option" in root.conditions:
        found["option"] = lambda model, x: model(x, option=True)
    if "keyword" in root.conditions:
        found["keyword"] = lambda model, x: model(x, extra=True)
    if root.public:
        found[root.public_name] = lambda model, x: getattr(model, root.public_name)(x)
    for name in root.parts_of_forward:
        found[name] = lambda model, x, name=name: getattr(model, name)(x)
    return found


def train_norm(number):
    def change(tree, model):
        for norm in batch_norms(model)[number : number + 1]:
            norm.train(not norm.training)

    return change


def batch_norms(model):
    names = ("BatchNorm2d", "BatchNorm1d", "NamedNorm", "FunctionalNorm", "ActivatedNorm", "DoublingNorm")
    return [module for module in model.modules() if type(module).__name__ in names]


def flip_flags(tree, model):
    for module in model.modules():
        if "flag" in vars(module):
            module.flag = not module.flag
        if "way" in vars(module):
            module.way = type(module.way).SECOND


#: What happens to a model later.
CHANGES = {
    "the first batch norm trains": train_norm(0),
    "the second batch norm trains": train_norm(1),
    "flags are flipped": flip_flags,
    "train()": lambda tree, model: model.train(),
    "train() with frozen batch norms": lambda tree, model: model.train(*[True, True][: 1 + tree.root.trains]),
    "eval()": lambda tree, model: model.eval(),
}


# --- What is compared --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as printed:
        warnings.simplefilter("ignore")
        yield printed


def outcome(tree, model, parameters, way, gradients=True):
    """What a call returns, and every gradient, those of what it returns besides the last value too."""
    x = tree.example_input().requires_grad_(gradients)
    sources = {"input": x, **{name: each for name, each in parameters.items() if each.requires_grad}}
    with torch.set_grad_enabled(gradients), quiet():
        outputs = pytree.tree_leaves(way(model, x.clone()))
        found = {f"output {i}": output.detach().clone() for i, output in enumerate(outputs)}
        found |= {f"output {i} requires grad": output.requires_grad for i, output in enumerate(outputs)}
        roots = [output for output in outputs if output.requires_grad]
        if not roots:
            return found
        loss = sum((root * torch.linspace(1, 2, root.numel()).view_as(root)).sum() for root in roots)
        if "reentrant checkpoint" in tree.around:  # which refuses torch.autograd.grad
            loss.backward()
            grads = [source.grad for source in sources.values()]
            for source in sources.values():
                source.grad = None
        else:
            sources |= {f"output {i}": output for i, output in enumerate(outputs) if output.requires_grad}
            grads = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    return found | {f"gradient of {name}": grad for name, grad in zip(sources, grads, strict=True)}


def assert_same(expected, actual, what):
    assert expected.keys() == actual.keys(), what
    tensors = [value for value in expected.values() if isinstance(value, torch.Tensor) and value.numel()]
    largest = max((value.abs().max().item() for value in tensors), default=0.0)
    for name, value in expected.items():
        other = actual[name]
        if not (isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor)):
            assert value is other, f"{what}: {name} is {other}, not {value}"
            continue
        assert (value.shape, value.dtype) == (other.shape, other.dtype), f"{what}: {name}"
        error, size = (value - other).abs().max().item(), value.abs().max().item()
        allowed = 1e-7 * size + 1e-10 * largest  # sums that cancel are zero but for rounding
        assert error <= allowed, f"{what}: {name} is off by {error:.2g} of {size:.2g}"


def state(built):
    """Values of all parameters and buffers of a model's modules, registered or not."""
    return {
        f"{index}.{name}": tensor.detach().clone()
        for index, module in built.modules.items()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def snapshot(built):
    """What nothing may change: classes, modes, attributes, and which tensors and modules there are."""
    return {
        index: (
            type(module),
            {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()},
        )
        for index, module in built.modules.items()
    }


#: What is around the call of the library.
WITHIN = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def made(function, model, within="nothing"):
    """What the library makes of a model; it prints nothing, whatever the model's forwards print."""
    with quiet() as printed, WITHIN[within]():
        result = function(model)
    assert printed.getvalue() == ""
    return result


def made_while_it_runs(function, tree):
    """What the library makes of a model that another thread runs meanwhile, as it always does."""
    reference, original = (
        tree.build(),
        tree.build(),
    )  # which hold what a model reaches by weak references alone
    model, x = original.model, tree.example_input()
    expected = outcome(tree, reference.model, {}, ways(tree)["forward"], gradients=False)
    found, ended, runs = [], threading.Event(), threading.Event()

    def run():
        while not ended.is_set():
            with torch.no_grad():
                found.append(pytree.tree_leaves(model(x.clone())))
            runs.set()

    thread = threading.Thread(target=run)
    with quiet():
        thread.start()
        try:
            assert runs.wait(10)
            function(model)
        finally:
            ended.set()
            thread.join()
    for outputs in found:
        assert_same(
            {name: value for name, value in expected.items() if "requires" not in name},
            {f"output {i}": output for i, output in enumerate(outputs)},
            "in another thread",
        )


# --- Properties --------------------------------------------------------------------------------------------------


within = st.sampled_from(sorted(WITHIN, reverse=True))


@given(trees(), st.lists(st.sampled_from(list(CHANGES)), max_size=2), within)
def test_a_tuned_model_does_what_the_model_does(tree, changes, within):
    check_tune(tree, changes, within=within)


@given(tree=trees(Features(overwrites=True)))
def test_a_tuned_model_does_without_gradients_what_the_model_does(tree):
    check_tune(tree, gradients=False)


@given(tree=trees(TRACED))
def test_a_rewritten_graph_does_what_the_model_does(tree):
    check_transform(tree)


@given(trees(), within)
def test_a_deployed_model_does_what_the_model_does(tree, within):
    check_deploy(tree, within)


#: Every call does the same, whoever calls at the same time.
STATELESS = Features(training=False, momentum=()).without(functions=["print"])


@pytest.mark.parametrize("function", [convbn_fx.tune, convbn_fx.deploy])
def test_another_thread_runs_the_model_meanwhile(function):
    @settings(max_examples=settings().max_examples // 5)
    @given(trees(STATELESS))
    def check(tree):
        tell(tree)
        made_while_it_runs(function, tree)

    check()


def tell(tree):
    if currently_in_test_context():
        note(tree.write())


def check_tune(tree, changes=(), gradients=True, within="nothing"):
    tell(tree)
    reference, original = tree.build(), tree.build()
    before, values = snapshot(original), state(original)
    tuned = made(convbn_fx.tune, original.model, within)
    assert_same(values, state(original), "state after tune")
    assert snapshot(original) == before

    def compare(model, what):
        for name, way in ways(tree).items():
            expected = outcome(tree, reference.model, reference.parameters, way, gradients)
            actual = outcome(tree, model, original.parameters, way, gradients)
            assert_same(expected, actual, f"{name} {what}")
            assert_same(state(reference), state(original), f"state after {name} {what}")

    compare(tuned, "tuned")
    compare(original.model, "of the original")
    for change in changes:
        CHANGES[change](tree, reference.model)
        CHANGES[change](tree, tuned)
        compare(tuned, f"after {change}")
    if tree.can_be_copied:
        copies = copy.deepcopy(reference.model), copy.deepcopy(tuned)
        expected, actual = (
            outcome(tree, each, dict(each.named_parameters()), ways(tree)["forward"], gradients)
            for each in copies
        )
        assert_same(expected, actual, "copied")
    assert snapshot(original) == before


def check_transform(tree):
    tell(tree)
    reference, original = tree.build(), tree.build()
    before, values = snapshot(original), state(original)
    try:
        with quiet():
            traced = convbn_fx.symbolic_trace(original.model)
    except convbn_fx.TracingError:
        return
    finally:
        assert snapshot(original) == before
        assert_same(values, state(original), "state after symbolic_trace")
    transformed = made(convbn_fx.transform, traced)
    # A forward that writes does so twice where a checkpoint runs it again, once in a graph, which has no checkpoint.
    writes_again = any("momentum" in feature for feature in features_of(tree))
    gradients = not (writes_again and any("checkpoint" in around for around in tree.around))
    for name in ("forward", "twice", "no_grad", "inference_mode"):
        expected = outcome(tree, reference.model, reference.parameters, ways(tree)[name], gradients)
        actual = outcome(tree, transformed, original.parameters, ways(tree)[name], gradients)
        assert_same(expected, actual, name)
        if not any("checkpoint" in around for around in tree.around):  # which a graph does without
            assert_same(state(reference), state(original), f"state after {name}")
    assert snapshot(original) == before


def check_deploy(tree, within="nothing"):
    tell(tree)
    reference, original = tree.build(), tree.build()
    before, values = snapshot(original), state(original)
    deployed = made(convbn_fx.deploy, original.model, within)
    assert_same(values, state(original), "state after deploy")
    assert not any(tensor.is_inference() for tensor in deployed.state_dict().values())
    for name, way in ways(tree).items():
        if name in tree.root.parts_of_forward:  # docs/limits.md
            continue
        expected = outcome(tree, reference.model, {}, way, gradients=False)
        assert_same(expected, outcome(tree, deployed, {}, way, gradients=False), f"{name} deployed")
        assert_same(state(reference), state(original), f"state after {name} deployed")
    assert snapshot(original) == before


# --- What was found, each at its smallest ------------------------------------------------------------------------


CONV_AND_NORM = (Conv(), Norm())


def blocks(*blocks, leaves=CONV_AND_NORM, public=()):
    made = [Block(tuple(children), tuple(steps)) for children, steps in blocks]
    return Tree((*leaves, *made[:-1], replace(made[-1], public=public)))


CONV, NORM = Child(0), Child(1)
PAIR = ((CONV, NORM), (Apply(0, (0, 1)),))
TWO_BLOCKS = (Apply(0, (0,)), Apply(0, (1,)), Add(1, 2))
FOUND = {
    "a convolution of two blocks with batch norms of their own": blocks(
        ((CONV, Child(1)), (Apply(0, (0, 1)),)),
        ((CONV, Child(2)), (Apply(0, (0, 1)),)),
        ((Child(3), Child(4)), TWO_BLOCKS),
        leaves=(Conv(), Norm(), Norm()),
    ),
    "a block that ends in a convolution, normalised once": blocks(
        ((CONV,), (Apply(0, (0,)),)),
        ((Child(2), NORM), (Apply(0, (0, 1)), Apply(0, (0,)), Add(1, 2))),
    ),
    "a closure of another block": blocks(
        ((Child(0, "closure"),), (Apply(0, (0,)),)), PAIR, ((Child(2), Child(3)), TWO_BLOCKS)
    ),
    "another name of a convolution": blocks(((CONV, NORM, Child(0, "list")), (*PAIR[1], Apply(1, (2,))))),
    "a tied weight": blocks(((CONV, NORM, Child(0, "list")), (*PAIR[1], Weight(1, 2, transposed=True)))),
    "sizes unpacked in between": blocks(((CONV, NORM), (*PAIR[1], Function(1, "size"), Apply(2, (0,))))),
    "an attribute of a batch norm": blocks(((CONV, NORM), (*PAIR[1], Read(1, 1, "num_features")))),
    "the class of a convolution": blocks(
        ((CONV, Child(1, "bound method")), (Apply(0, (0, 1), "loop, type of convolution"),))
    ),
    "an autograd.Function on a convolution's output": blocks(
        ((CONV, NORM, Child(2)), (Apply(0, (0, 1, 0, 2)),)), leaves=(Conv(), Norm(), Act("SwishModule()"))
    ),
    "a pre-forward hook": Tree(
        (
            Conv(),
            Norm(),
            Block((CONV,), (Function(0),), hook=0),
            Block((CONV, NORM, Child(2)), (*PAIR[1], Apply(1, (2,)))),
        )
    ),
    "a child that a batch norm does not call": blocks(PAIR, leaves=(Conv(), Norm("NamedNorm"))),
    "a weak proxy": blocks(((Child(1, "proxy"),), (Apply(0, (0,)),))),
    "another method that calls a closure": blocks(
        ((CONV, Child(1, "closure")), (Apply(0, (0, 1)), Apply(1, (0, 1)))), public=(1,)
    ),
    "another method that calls what is not registered": blocks(
        ((CONV, NORM, Child(1, "__setattr__")), (*PAIR[1], Read(1, 2, "num_features"))), public=(2,)
    ),
    "a decorated method on another way": blocks(
        ((CONV, NORM), (Branch("keyword", Apply(0, (0,), "decorated method")), Apply(1, (0, 1))))
    ),
    **{
        f"a momentum copy, {writer}, {'a' if is_buffer else 'no'} buffer": blocks(
            ((CONV, NORM), (*PAIR[1], Momentum(1, 0, writer, is_buffer)))
        )
        for writer in MOMENTUM
        for is_buffer in (True, False)
    },
    **{
        f"a guessed number: {around}": blocks(((CONV, NORM), (Apply(0, (0, 1), around),)))
        for around in AROUND
        if around.startswith(("repeated", "some of them"))
    },
    "a linear layer": blocks(PAIR, leaves=(Conv("nn.Linear"), Norm("nn.BatchNorm1d"))),
    "a call that does more": blocks(PAIR, leaves=(Conv("DoublingCallConv"), Norm())),
    "a weight that is computed when it is read": blocks(PAIR, leaves=(Conv("InterceptedConv"), Norm())),
}
each_found = pytest.mark.parametrize("tree", FOUND.values(), ids=FOUND)


@each_found
def test_what_was_found_wrong_of_tune(tree):
    check_tune(tree, ["the first batch norm trains", "train()"])


@each_found
def test_what_was_found_wrong_of_transform(tree):
    check_transform(tree)


@each_found
def test_what_was_found_wrong_of_deploy(tree):
    check_deploy(tree)


# --- The properties can fail -------------------------------------------------------------------------------------


def printing(model):
    sys.stdout.write("traced")
    return copy.deepcopy(model)


def without_gradients(model):
    tuned = copy.deepcopy(model)
    tuned.requires_grad_(False)
    return tuned


def normalising_less(model):
    tuned = convbn_fx.deploy(model)
    tuned.c0.bias.data.mul_(1 + 1e-5)
    return tuned


WRONG = {
    "prints": printing,
    "changes the original": lambda model: model.train(),
    "has no gradients": without_gradients,
    "does not share parameters": copy.deepcopy,
    "is off a little": normalising_less,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_result_is_noticed(wrong, monkeypatch):
    monkeypatch.setattr(convbn_fx, "tune", wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check_tune(blocks(PAIR))


def exchanging_the_forward_for_a_while(model):
    model.forward = torch.zeros_like
    time.sleep(0.05)
    del model.forward


def test_another_threads_wrong_result_is_noticed():
    with pytest.raises(AssertionError, match="in another thread"):
        made_while_it_runs(exchanging_the_forward_for_a_while, blocks(PAIR))


def writing_to_buffers(model):
    model.momentum1.mul_(2)
    return copy.deepcopy(model)


@pytest.mark.parametrize("within", WITHIN)
def test_a_write_meanwhile_is_noticed(within, monkeypatch):
    tree = FOUND["a momentum copy, foreach, a buffer"]
    monkeypatch.setattr(convbn_fx, "deploy", writing_to_buffers)
    with pytest.raises(AssertionError, match="state after deploy"):
        check_deploy(tree, within)


def with_a_tensor_of_inference_mode(model):
    deployed = copy.deepcopy(model)
    deployed.c0.bias = torch.nn.Parameter(model.c0.bias.detach() * 1)
    return deployed


def test_what_cannot_be_trained_after_inference_mode_is_noticed(monkeypatch):
    monkeypatch.setattr(convbn_fx, "deploy", with_a_tensor_of_inference_mode)
    check_deploy(blocks(PAIR))
    with pytest.raises(AssertionError):
        check_deploy(blocks(PAIR), "inference_mode")


# --- Nothing is right because all is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("function", [convbn_fx.tune, convbn_fx.deploy])
def test_where_nothing_is_special_every_pair_of_one_place_is_fused(function):
    """A convolution that is followed by its batch norm and is nowhere else, in blocks that are called once."""

    @given(tree=trees(PLAIN))
    def check(tree):
        built = tree.build()
        fused = {(p.convolution, p.batch_norm) for p in convbn_fx.report(made(function, built.model)).fused}
        names = {id(module): name for name, module in built.model.named_modules()}
        for conv, norm in pairs_of_one_place(tree):
            assert (names[id(built.modules[conv])], names[id(built.modules[norm])]) in fused

    check()


def pairs_of_one_place(tree):
    """By the spec alone: modules that follow one another in one chain, and are in no other chain or block."""
    uses = {}
    for index in tree.reached:
        block = tree.modules[index]
        if isinstance(block, Block):
            for step in block.steps:
                chain = (
                    [block.children[slot].module for slot in step.chain] if isinstance(step, Apply) else []
                )
                for place, module in enumerate(chain):
                    uses.setdefault(module, []).append(chain[place + 1 :][:1])
    for module, followers in uses.items():
        if tree.modules[module].kind == "conv" and len(followers) == 1 and followers[0]:
            (norm,) = followers[0]
            if tree.modules[norm].kind == "norm" and len(uses[norm]) == 1:
                yield module, norm


# --- What is drawn -----------------------------------------------------------------------------------------------


SEARCH = settings(settings.get_profile("dev"), derandomize=True, database=None, max_examples=800)

#: What must have been drawn, besides all that stands in a table.
OTHERS = {
    *("shared conv", "shared norm", "shared act", "shared block", "children twice", "two of a class"),
    *("conv tied", "norm tied", "norm training", "conv frozen", "homeless", "hook", "public", "outputs"),
    *("trains", "method of a child", "weight", "add", "momentum is a buffer", "momentum is no buffer"),
}


@pytest.mark.slow
def test_everything_is_drawn():
    """A property says nothing about what is never drawn."""
    missing = {*CONVS, *NORMS, *FLAT, *ACTS, *OTHERS}
    for prefix, names in {
        "held": HELD,
        "function": {**FUNCTIONS, **IN_PLACE},
        "if": CONDITIONS,
        "around": AROUND,
        "read": READ_OF,
        "momentum": MOMENTUM,
    }.items():
        missing |= {f"if {name}" if prefix == "if" else f"{prefix}: {name}" for name in names}

    @settings(SEARCH, max_examples=8000, phases=[Phase.generate])
    @given(trees())
    def draw(tree):
        missing.difference_update(features_of(tree))

    draw()
    assert missing == set()


def test_the_smallest_tree_with_a_pair_is_small():
    """Failing examples shrink."""
    found = find(trees(), lambda tree: any(pairs_of_one_place(tree)), settings=SEARCH)
    assert len(found.reached) == 3
    assert features_of(found) == {"nn.Conv2d", "nn.BatchNorm2d", "held: attribute", "around: plain"}
