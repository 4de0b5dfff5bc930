"""What `mkdocs build` does besides: it takes the root's pages along, and refuses an API page that lacks a name."""

import ast
import re
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


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of the root."""
    from mkdocs.structure.files import File

    for name in FROM_ROOT:
        files.append(File.generated(config, name, content=from_root(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Refuses an API page without one of the public names."""
    from mkdocs.exceptions import PluginError

    if page.file.src_uri == "api.md" and (missing := public_names() - documented_names(markdown)):
        raise PluginError(f"api.md lacks {', '.join(sorted(missing))}")
    return markdown
