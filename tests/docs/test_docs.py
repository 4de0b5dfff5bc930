"""Everything that the README and the pages show runs, and what they say of the code is so."""

import os
import pkgutil
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from sources import DOCS, HOOKS, PAGES, ROOT, skip_without_operator
from torch import nn

import convbn_fx
from convbn_fx import SkipReason, kinds
from convbn_fx.functional import cost_rule as costs
from convbn_fx.kinds import third_party as libraries

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

#: Pages whose blocks follow one another, as a reader would paste them.
CONTINUED = ("docs/tutorial.md", "docs/adding-a-kind.md")
#: Libraries whose own code warns, or takes its time, when it is used.
WARNING = ("foolbox", "lightning", "onnx", "segmentation_models_pytorch")
SLOW = ("lightning", "inductor", "onnx", "segmentation_models_pytorch")


def page(name):
    return PAGES[f"docs/{name}.md"]


# --- What is shown runs --------------------------------------------------------------------------------------------


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def script_name(block):
    """The file that a block is to be saved as, if its first line names one."""
    named = re.match(r"# (\w+\.py)\n", block)
    return named and named.group(1)


def snippets():
    for name, text in PAGES.items():
        found = [block for block in blocks(text) if not script_name(block)]
        if name in CONTINUED:
            found = ["".join(found)]
        for number, block in enumerate(found):
            marks = [pytest.mark.slow] if any(word in block for word in SLOW) else []
            if any(word in block for word in WARNING):
                marks.append(pytest.mark.filterwarnings("ignore"))
            yield pytest.param(block, id=f"{name}, block {number}", marks=marks)


SCRIPTS = {
    script_name(block): block for text in PAGES.values() for block in blocks(text) if script_name(block)
}
COMMANDS = [
    line.partition("#")[0].strip()
    for text in PAGES.values()
    for block in re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.usefixtures("real_costs")
@pytest.mark.parametrize("block", list(snippets()))
def test_a_block_runs(block, tmp_path, monkeypatch):
    skip_without_operator(block)
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    exec(compile(block, "a block", "exec"), {"__name__": "readme"})


def test_the_blocks_are_found():
    assert all(text.count("```python") == len(blocks(text)) for text in PAGES.values())
    assert len(list(snippets())) > 20
    assert SCRIPTS


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_with_its_command(name, tmp_path):
    (tmp_path / name).write_text(SCRIPTS[name], encoding="utf-8")
    (command,) = [shlex.split(command) for command in COMMANDS if command.endswith(name)]
    program = {"torchrun": ["-m", "torch.distributed.run"], "python": []}[command[0]]
    done = subprocess.run(
        [sys.executable, *program, *command[1:]],
        cwd=tmp_path,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        | {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_make_command_is_a_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, text in PAGES.items():
        for target in re.findall(r"(?:^|`)make ([\w-]+)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{name}: make {target}"


def test_every_option_of_the_command_line_exists():
    typer = pytest.importorskip("typer")
    from convbn_fx.cli.commands import app

    commands = typer.main.get_command(app).commands
    found = [shlex.split(command) for command in COMMANDS if command.startswith("convbn-fx ")]
    assert len(found) >= 5
    for _, name, *words in found:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, name
    report = {option for parameter in commands["report"].params for option in parameter.opts}
    assert set(re.findall(r"`(--\w+)`", page("command-line"))) - {"--help"} <= report


# --- The site ----------------------------------------------------------------------------------------------------


def nav(entry):
    if isinstance(entry, str):
        return [entry]
    children = entry if isinstance(entry, list) else entry.values()
    return [name for child in children for name in nav(child)]


def test_every_page_is_in_the_navigation():
    assert set(nav(SITE["nav"])) == {path.name for path in DOCS.glob("*.md")} | set(HOOKS.FROM_ROOT)


def test_the_build_fetches_nothing_and_a_warning_is_an_error():
    assert SITE["strict"] is True
    assert SITE["theme"]["font"] is False
    assert {entry["scheme"] for entry in SITE["theme"]["palette"]} == {"default", "slate"}
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "http" not in text
    assert "extra_javascript" not in SITE
    assert not any("url(" in (DOCS / path).read_text(encoding="utf-8") for path in SITE["extra_css"])


def test_links_lead_somewhere():
    for name, text in PAGES.items():
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            path = (folder / target).resolve()
            assert path.exists(), f"{name}: {target}"


@pytest.mark.parametrize("name", HOOKS.FROM_ROOT)
def test_the_pages_of_the_root_have_links_that_hold_in_the_site(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", HOOKS.from_root(name)):
        assert (DOCS / target).exists(), target


# --- What is said is so ------------------------------------------------------------------------------------------


def sections(text, level):
    """Text under each heading of a level."""
    parts = re.split(
        rf"^#{{{level}}} (.*)\n", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text, header):
    """Cells of the table whose first header cell is given."""
    (table,) = re.findall(rf"^\| {re.escape(header)} \|.*\n\|[-| ]*\n((?:\|.*\n)*)", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_every_reason_has_an_entry_with_its_cure():
    entries = {name.strip("`"): " ".join(text.split()) for name, text in sections(page("limits"), 3).items()}
    assert list(entries) == [reason.name for reason in SkipReason]
    for reason in SkipReason:
        entry = entries[reason.name]
        assert f"*{reason.value[0].upper()}{reason.value[1:]}.*" in entry
        assert f"**Cure:** {reason.cure.rstrip('.')}." in entry


def known(table):
    """Rows of PyTorch's own classes; other tests may have registered theirs."""
    return {
        cls.__name__: row
        for cls, row in table.items()
        if getattr(nn, cls.__name__, None) is cls and "Lazy" not in cls.__name__
    }


def test_the_supported_convolutions_are_those_of_the_table():
    text = sections(page("supported"), 2)["Convolutions"]
    told = {name.strip("`"): rank for name, _, rank in rows(text, "module")}
    table = known(kinds.classes.CONVOLUTION_CLASSES.rows)
    assert told == {name: f"{row.batched_rank} dimensions" for name, row in table.items()}
    of_timm = [name.strip("`") for name, _ in rows(text, "module of timm")]
    assert of_timm == [name.rpartition(".")[2] for name in libraries.CONVOLUTIONS]


def test_the_supported_batch_norms_are_those_of_the_table():
    ranks = {None: "any from 2 on", (2, 3): "2 or 3 dimensions", (4,): "4 dimensions", (5,): "5 dimensions"}
    text = sections(page("supported"), 2)["Batch norms"]
    told = {name.strip("`"): rank for name, rank in rows(text, "module")}
    table = known(kinds.classes.BATCH_NORM_CLASSES.rows)
    assert told == {name: ranks[row.accepted_ranks] for name, row in table.items()}
    others = {name.strip("`"): what for name, what in rows(text, "module of another library")}
    assert list(others) == list(libraries.BATCH_NORMS)


def test_the_supported_functions_are_those_of_the_table():
    text = sections(page("supported"), 2)["Functions"]
    for header, table in (
        ("convolution", kinds.CONVOLUTION_FUNCTIONS),
        ("batch norm", kinds.BATCH_NORM_FUNCTIONS),
    ):
        told = [name for cells in rows(text, header) for name in re.findall(r"`([\w.]+)`", cells[0])]
        assert sorted(told) == sorted({row.name for row in table.values()})


def test_the_api_page_has_every_public_name_and_no_other():
    told = HOOKS.documented_names(page("api"))
    assert HOOKS.public_names() >= {f"convbn_fx.{name}" for name in convbn_fx.__all__}
    assert HOOKS.public_names() - told == set()
    assert told - HOOKS.public_names() == {"convbn_fx.compiler.convbn", "convbn_fx.functional.arithmetic"}
    for name in told:
        assert pkgutil.resolve_name(name) is not None


def test_a_missing_name_is_noticed():
    without = page("api").replace("::: convbn_fx.tune\n", "")
    assert HOOKS.public_names() - HOOKS.documented_names(without) == {"convbn_fx.tune"}


def test_the_numbers_of_the_cost_rule(real_costs):
    text = " ".join(page("how-it-works").split())
    assert f"fewer than {costs.COSTS['cpu'].fixed} elements" in text
    assert {each.weight_per_output for each in costs.COSTS.values()} == {16.0}
    assert "more than 16 times as large as the output" in text
    assert costs.COSTS["cuda"].fixed == 0


def test_the_pass_is_shown_in_the_packages_own_code():
    text = HOOKS.with_code(page("the-pass"))
    shown = re.findall(r'```python title="convbn_fx/(.*?)"\n(.*?)```', text, flags=re.DOTALL)
    assert "{{" not in text
    assert {file.partition("/")[0] for file, _ in shown} == {"fx", "functional"}
    for file, code in shown:
        source = [
            line.strip() for line in (ROOT / "convbn_fx" / file).read_text(encoding="utf-8").splitlines()
        ]
        assert {line.strip() for line in code.splitlines()} <= set(source)
        assert '"""' not in code
    with pytest.raises(LookupError, match=r"fx/rewriting\.py has no forgotten"):
        HOOKS.with_code("{{ fx/rewriting.py forgotten }}")


# --- The architecture --------------------------------------------------------------------------------------------


def test_the_architecture_names_every_folder():
    package = ROOT / "convbn_fx"
    folders = {path.parent.relative_to(package).as_posix() for path in package.rglob("__init__.py")} - {"."}
    told = set(re.findall(r"^\| .*?\|", page("architecture"), re.MULTILINE))
    assert {folder for folder in folders if not any(f"`{folder}/`" in row for row in told)} == set()


def test_every_folder_says_what_it_knows_and_what_it_must_not():
    for path in (ROOT / "convbn_fx").rglob("*/__init__.py"):
        if path.parent.name != "kinds":  # the table itself
            text = " ".join(path.read_text(encoding="utf-8").partition('"""')[2].partition('"""')[0].split())
            assert text.startswith("Knows "), path
            assert " not " in text or "Nothing " in text, path
