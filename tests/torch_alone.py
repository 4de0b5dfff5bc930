"""Which files of tests can run where torch is, and what the others need besides is not (`make test-torch`)."""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

TESTS = Path(__file__).parent


def left_out() -> list[str]:
    """The files that cannot run here for want of a library; none where torchvision is: then all are to be there."""
    if find_spec("torchvision") is not None:
        return []
    found = (path for path in TESTS.rglob("test_*.py") if _lacks_something(path))
    return sorted(path.relative_to(TESTS).as_posix() for path in found)


def _lacks_something(path: Path) -> bool:
    """Whether the file, or one that it imports, imports a library that is not installed."""
    seen, todo = set(), [path]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _imported(path):
            own = [
                folder / f"{name.replace('.', '/')}{end}"
                for folder in _FOLDERS
                for end in (".py", "/__init__.py")
            ]
            found = [file for file in own if file.exists()]
            if not found and find_spec(name.partition(".")[0]) is None:
                return True
            todo += found
    return False


_FOLDERS = (TESTS, TESTS.parent)


def _imported(path: Path) -> Iterator[str]:
    """Names of modules; of those that are imported from the package, too, where a module is meant by them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module.partition(".")[0] in ("bench", "convbn_fx"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
