"""Everything that the README shows runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs(number: int) -> None:
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), {"__name__": "readme"})


def test_the_blocks_are_found() -> None:
    assert len(BLOCKS) == README.count("```python") >= 4


def test_the_commands_are_targets() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"\bmake (\w+)", README)
    assert {"demo", "test", "help"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command}\b.*:", makefile, flags=re.MULTILINE), command


def test_the_report_shown_is_the_report(capsys):
    exec(compile(BLOCKS[0], "README.md, block 0", "exec"), {"__name__": "readme"})
    shown = re.search(r"```text\n(.*?)\.\.\.\n```", README, flags=re.DOTALL).group(1)
    assert capsys.readouterr().out.startswith(shown)
