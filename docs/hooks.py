"""What `mkdocs build` does besides: takes the root's pages along, cuts code, refuses an API page that lacks a name."""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent

#: Pages of the site that are files of the root, where those who look for them expect them.
FROM_ROOT: Final = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}

#: Modules whose public names the API page has to have: those of `convbn_fx.__all__` among them.
PUBLIC_MODULES: Final = ("convbn_fx", "convbn_fx.functional", "convbn_fx.memory", "convbn_fx.testing")


def from_root(name: str) -> str:
    """A page of the root, its links seen from `docs`.

    Args:
        name: One of the keys of `FROM_ROOT`.

    Returns:
        Markdown.
    """
    page = (ROOT / FROM_ROOT[name]).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", page)


def public_names() -> set[str]:
    """The qualified names of everything public, read from each `__all__` without an import of PyTorch."""
    names = set()
    for module in PUBLIC_MODULES:
        path = ROOT.joinpath(*module.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for statement in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
                names |= {f"{module}.{name}" for name in ast.literal_eval(statement.value)}
    return names


def documented_names(page: str) -> set[str]:
    """The names that a page has mkdocstrings document.

    Args:
        page: Markdown.

    Returns:
        Qualified names.
    """
    return set(re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE))


def with_code(page: str) -> str:
    """A page with functions of the package in the places where it names them, so that none of them is a copy.

    Args:
        page: Markdown, with lines such as `{{ fx/tracing.py Tracer.is_leaf_module }}`.

    Returns:
        Markdown with the source of each, without its docstring.

    Raises:
        LookupError: A file holds no such function.
    """
    return re.sub(r"^\{\{ (\S+) (\S+) \}\}$", lambda found: _code(*found.groups()), page, flags=re.MULTILINE)


def _code(file: str, name: str) -> str:
    source = (ROOT / "convbn_fx" / file).read_text(encoding="utf-8")
    statement: Any = ast.parse(source)
    for part in name.split("."):
        found = [each for each in statement.body if getattr(each, "name", None) == part]
        if not found:
            raise LookupError(f"convbn_fx/{file} has no {name}")
        (statement,) = found
    lines = source.splitlines()
    docstring = statement.body[0] if ast.get_docstring(statement) else None
    body = statement.body[1 if docstring else 0]
    signature = lines[statement.lineno - 1 : (docstring or body).lineno - 1]
    code = textwrap.dedent("\n".join([*signature, *lines[body.lineno - 1 : statement.end_lineno]]))
    return f'```python title="convbn_fx/{file}"\n{code}\n```'


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of the root."""
    from mkdocs.structure.files import File

    for name in FROM_ROOT:
        files.append(File.generated(config, name, content=from_root(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the code in its places, and refuses an API page without one of the public names."""
    from mkdocs.exceptions import PluginError

    if page.file.src_uri == "api.md" and (missing := public_names() - documented_names(markdown)):
        raise PluginError(f"api.md lacks {', '.join(sorted(missing))}")
    return with_code(markdown)
