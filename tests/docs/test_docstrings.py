"""The examples in docstrings run, and every public function has one."""

import ast
import inspect
import pkgutil
import re

import pytest
import torch
from sources import FILES, HOOKS, PAGES, skip_without_operator

import convbn_fx

DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def examples():
    for file, path in sorted(FILES.items()):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            docstring = ast.get_docstring(node) if isinstance(node, DEFINITIONS) else None
            blocks = re.findall(r"```python\n(.*?)```", docstring or "", flags=re.DOTALL)
            for block in blocks:
                yield pytest.param(inspect.cleandoc(block), id=f"{file}.{node.name}")


@pytest.mark.parametrize("block", list(examples()))
def test_an_example_runs(block, tmp_path, monkeypatch):
    skip_without_operator(block)
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    exec(compile(block, "an example", "exec"), {"__name__": "example"})


def documented():
    for name in sorted(HOOKS.documented_names(PAGES["docs/api.md"])):
        thing = pkgutil.resolve_name(name)
        if inspect.isfunction(thing) or thing is convbn_fx.batchnorm_mode:
            yield pytest.param(thing, id=name)


@pytest.mark.parametrize("function", list(documented()))
def test_every_public_function_has_an_example(function):
    assert "    ```python\n" in function.__doc__


def test_functions_are_found():
    assert {parameter.values[0] for parameter in documented()} >= {
        convbn_fx.tune,
        convbn_fx.memory.saved_bytes,
    }
