"""Everything that the README and the documentation show runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
}
README = PAGES["README.md"]
BLOCKS = {
    f"{name}, block {number}": block
    for name, page in PAGES.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
}


@pytest.mark.usefixtures("real_costs")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(name: str) -> None:
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": "readme"})


def test_the_blocks_are_found() -> None:
    assert len(BLOCKS) == sum(page.count("```python") for page in PAGES.values()) >= 6


def test_links_lead_somewhere() -> None:
    for name, page in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page):
            assert (folder / target).exists(), f"{name}: {target}"


def test_the_commands_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"\bmake (\w+)", README)
    assert {"demo", "test", "help"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command}\b.*:", makefile, flags=re.MULTILINE), command


def test_the_report_shown_is_the_report(capsys):
    exec(compile(BLOCKS["README.md, block 0"], "README.md, block 0", "exec"), {"__name__": "readme"})
    shown = re.search(r"```text\n(.*?)\.\.\.\n```", README, flags=re.DOTALL).group(1)
    assert capsys.readouterr().out.startswith(shown)
