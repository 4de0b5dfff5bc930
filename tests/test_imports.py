"""The core imports torch alone. In which direction its folders import each other is a contract in pyproject.toml."""

import ast
import subprocess
import sys

import pytest
from sources import FILES, PACKAGE

import convbn_fx

#: The command line, which an extra installs what it needs for.
COMMANDS = {name for name in FILES if name == "__main__" or name.partition(".")[0] == "cli"}
#: What only an extra installs, or what a library for any model has no business with.
FOREIGN = {
    "torchvision",
    "timm",
    "rich",
    "typer",
    "click",
    "matplotlib",
    "hypothesis",
    "pytest",
    "PIL",
    "scipy",
}


def imports(name):
    """Modules that a file of the package imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def in_a_fresh_process(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


LIST_MODULES = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"


def test_the_import_of_the_library_brings_torch_alone():
    with_torch = in_a_fresh_process(f"import torch, torch.fx; {LIST_MODULES}")
    with_library = in_a_fresh_process(f"from convbn_fx import *; {LIST_MODULES}")
    surplus = with_library - with_torch - {"convbn_fx"} - set(sys.stdlib_module_names)
    installed_by_torch = {
        "sympy",
        "mpmath",
        "networkx",
        "numpy",
        "filelock",
        "fsspec",
        "jinja2",
        "typing_extensions",
    }
    assert not surplus - installed_by_torch
    assert not with_library & FOREIGN
    assert "torch" in with_library


def test_using_the_library_brings_nothing_else():
    used = in_a_fresh_process(
        "import torch, convbn_fx; "
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval(); "
        "gm = convbn_fx.transform(convbn_fx.symbolic_trace(model)); "
        "gm(torch.ones(1, 3, 5, 5)).sum().backward(); str(convbn_fx.report(gm)); "
        f"{LIST_MODULES}"
    )
    assert not used & FOREIGN


@pytest.mark.parametrize(
    "first", ["compiler", "functional", "kinds.modes", "records", "testing", "tuning.cloning"]
)
def test_public_names_are_the_same_whatever_is_imported_first(first):
    in_a_fresh_process(
        f"import convbn_fx.{first}; import convbn_fx, inspect; from convbn_fx import *; "
        "functions = [batchnorm_mode, deploy, report, symbolic_trace, transform, tune, untune]; "
        "assert all(map(callable, functions)); "
        "assert convbn_fx.report is report; assert inspect.ismodule(testing)"
    )


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.partition(".")[0] == "functional"))
def test_the_operator_knows_torch_and_not_fx(name):
    found = {found for found in imports(name) if found.startswith("torch.fx")}
    # What a compiler is told about the operations that it captures: no graph.
    assert all(found.startswith("torch.fx.traceback") for found in found)


@pytest.mark.parametrize("name", sorted(FILES.keys() - COMMANDS))
def test_the_core_imports_torch_and_the_standard_library(name):
    allowed = {"torch", "convbn_fx"} | set(sys.stdlib_module_names)
    if name == "operands":
        allowed.add("typing_extensions")  # for type checkers alone
    assert {found.partition(".")[0] for found in imports(name)} <= allowed


def test_the_public_names():
    assert set(convbn_fx.__all__) <= set(dir(convbn_fx))
    for name in convbn_fx.__all__:
        assert getattr(convbn_fx, name) is not None
    with pytest.raises(AttributeError, match="module 'convbn_fx' has no attribute 'fuse'"):
        _ = convbn_fx.fuse
    for name in ("symbolic_trace", "transform", "report", "functional", "testing", "register_conv"):
        assert name in convbn_fx.__all__
    assert convbn_fx.functional.conv_batch_norm.__module__ == "convbn_fx.functional"
    assert (PACKAGE / "py.typed").exists()


def test_few_files_lie_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 12
