"""Writes docs/benchmarks.md from the committed results: `python -m bench.tools.page`. Nothing on that page is typed."""

import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from bench.__main__ import module_of
from bench.experiments import EXPERIMENTS
from bench.experiments.alternatives import by_network
from bench.harness.better import advantages, better_than_tune
from bench.harness.contenders import EVAL, MEANING, TUNE
from bench.harness.markdown import table
from bench.harness.results import RESULTS, Result, read
from bench.harness.timing import Ratio, ratio
from bench.paper import beside

PAGE = Path("docs/benchmarks.md")
PICTURES = Path("docs/figures")
#: A table of more lines than a screen has is behind a fold.
SCREEN: Final = 40

TITLE = """# Benchmarks

<!-- Written by `python -m bench.tools.page` from the files in bench/results; not by hand. -->
"""

HEAD = """
Every table comes from one file in `bench/results`, which holds every sample, the command and the environment. Times
are compared within a run only, contenders in turns; a difference of a few per cent is noise on a shared machine.

A benchmark names the table or figure of the paper (You et al., arXiv 2305.11624) that it repeats, and has the paper's
numbers beside its own; they are in `bench/paper`.
"""


def main() -> int:
    """Writes the page and its pictures.

    Returns:
        The exit status.
    """
    results = [result for name in EXPERIMENTS for result in _of(name)]
    PAGE.write_text(
        "\n".join(
            [
                TITLE,
                *_overview(results),
                HEAD,
                *_contenders(),
                *_environments(results),
                *_better(results),
                *_sections(results),
            ]
        ),
        encoding="utf-8",
    )
    return 0


def _of(benchmark: str) -> Iterator[Result]:
    """The benchmark's results: on the CPU, then those on other devices."""
    for path in sorted(RESULTS.glob(f"{benchmark}.json")) + sorted(RESULTS.glob(f"{benchmark}-*.json")):
        result = read(path)
        if result.benchmark == benchmark:
            yield result


def _contenders() -> Iterator[str]:
    yield "## The contenders\n"
    yield table(("contender", "what it is"), MEANING.items())


def _environments(results: list[Result]) -> Iterator[str]:
    yield "## Where they were measured\n"
    by_environment = sorted(results, key=lambda result: sorted(map(str, result.environment.items())))
    for _, group in groupby(by_environment, key=lambda result: dict(result.environment)):
        same = list(group)
        facts = ", ".join(f"{name} {value}" for name, value in same[0].environment.items())
        yield f"- {', '.join(sorted(result.benchmark for result in same))}: {facts}\n"


#: By contender what it takes of a network, as a share of Eval's: bytes, and time.
Shares = dict[str, tuple[float | None, Ratio | None]]


def _overview(results: list[Result]) -> Iterator[str]:
    """One picture of all contenders, and what it says in three sentences."""
    for result in results:
        if result.benchmark == "alternatives" and _device(result) == "cpu":
            size = result.settings["batches"][0], result.settings["image"]
            networks = {name: _shares(rows, str(size[0])) for name, rows in by_network(result).items()}
            PICTURES.mkdir(exist_ok=True)
            _picture(networks).savefig(PICTURES / "overview.png", dpi=120)
            yield "![Bytes and time of all contenders as shares of Eval's](figures/overview.png)\n"
            yield " ".join(_sentences(networks, f"{size[0]}x{size[1]}")) + "\n"


def _shares(rows: list[Mapping[str, Any]], batch: str) -> Shares:
    (reference,) = (row for row in rows if row["contender"] == EVAL)
    return {
        row["contender"]: (
            None if row["bytes"][batch] is None else row["bytes"][batch] / reference["bytes"][batch],
            None if row["seconds"] is None else ratio(row["seconds"], reference["seconds"]),
        )
        for row in rows
    }


def _sentences(networks: Mapping[str, Shares], size: str) -> Iterator[str]:
    tuned = [
        f"{memory:.0%} of the bytes and {time.median:.0%} of the time in {name}"
        for name, shares in networks.items()
        for memory, time in (shares[TUNE],)
        if memory is not None and time is not None
    ]
    yield f"Tune takes, as shares of Eval's at {size}, {'; '.join(tuned)}."
    small = [
        f"{name}'s {min((memory, each) for each, (memory, _) in shares.items() if memory is not None)[1]}"
        for name, shares in networks.items()
    ]
    yield f"The fewest bytes between forward and backward are held by {', '.join(small)}."
    fast = [
        f"{name}'s {min((time.median, each) for each, (_, time) in shares.items() if time is not None)[1]}"
        for name, shares in networks.items()
    ]
    yield f"The fastest is {', '.join(fast)}."


def _picture(networks: Mapping[str, Shares]) -> Figure:
    figure = Figure(figsize=(9, 3.6 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), 2, squeeze=False, sharey="row")
    for (left, right), (network, shares) in zip(grid, networks.items(), strict=True):
        names = [name for name, each in shares.items() if each != (None, None)][::-1]
        colours = ["C1" if name == TUNE else "C0" for name in names]
        left.barh(names, [shares[name][0] or 0 for name in names], color=colours)
        times = [shares[name][1] for name in names]
        right.barh(names, [0 if time is None else time.median for time in times], color=colours)
        for panel, what in ((left, "bytes held for the backward pass"), (right, "time of a step")):
            panel.axvline(1, color="black", linewidth=0.8)
            panel.set(title=network, xlabel=f"{what}, as a share of Eval's")
    return figure


def _better(results: list[Result]) -> Iterator[str]:
    yield "## Where another is better than Tune\n"
    yield (
        "Counted is who takes less than 0.99 of Tune's bytes, or less time in three rounds of four: in how many of the "
        "cases, and what at best, as a fraction of Tune's. Who learns better is under classification.\n"
    )
    compared = [
        (result, list(module_of(result.benchmark).cases(result)))
        for result in results
        if hasattr(module_of(result.benchmark), "cases")
    ]
    yield table(
        ("contender", "of what", "benchmark", "cases", "at best", "where"),
        (
            (
                each.contender,
                each.what,
                _titled(result),
                f"{len(each.places)} of {each.of}",
                f"{best:.2f}",
                where,
            )
            for result, cases in compared
            for each in advantages(cases)
            for best, where in (min((of_tune, label) for label, of_tune in each.places.items()),)
        ),
    )
    sentences = [
        f"- {_titled(result)}: {sentence}\n"
        for result, cases in compared
        for sentence in better_than_tune(cases)
    ]
    yield _fold("Every case", "".join(sentences))


def _fold(summary: str, text: str) -> str:
    return f'<details markdown="1">\n<summary>{summary}</summary>\n\n{text}\n</details>\n'


def _titled(result: Result) -> str:
    return f"{result.benchmark}, on the {_device(result).upper()}"


def _device(result: Result) -> str:
    return "gpu" if "gpu" in result.environment else "cpu"


def _sections(results: list[Result]) -> Iterator[str]:
    for result in results:
        module = module_of(result.benchmark)
        yield f"## {_titled(result)}\n"
        yield f"{module.__doc__.strip()}\n"
        yield f"`{result.command}`\n"
        for each in module.tables(result):
            lines = each.count("\n")
            yield _fold(f"A table of {lines - 2} rows", each) if lines > SCREEN else each
        yield from beside(result)
        yield from (f"- {note}" for note in result.notes)
        picture = PICTURES / f"{result.benchmark}-{_device(result)}.png"
        picture.parent.mkdir(exist_ok=True)
        module.plot(result).savefig(picture, dpi=120)
        yield f"\n![{result.benchmark}](figures/{picture.name})\n"


if __name__ == "__main__":
    sys.exit(main())
