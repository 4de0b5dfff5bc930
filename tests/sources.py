"""Files of the project that tests read: the package's by module, the pages by path, and what builds the site."""

import importlib.util
from pathlib import Path

import pytest

import convbn_fx
from convbn_fx.functional import native

PACKAGE = Path(convbn_fx.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md"))
}


def load_hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()


def skip_without_operator(block):
    """Skips an example of what the operator in C++ alone does: activations that save less."""
    if native.operator is None and "activations" in block:
        pytest.skip("the operator is not built: make setup")
