"""Writes docs/benchmarks.md from the committed results: `python -m bench.tools.page`. Nothing on that page is typed."""

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from bench.__main__ import module_of
from bench.experiments import EXPERIMENTS
from bench.harness.better import better_than_tune
from bench.harness.contenders import MEANING
from bench.harness.markdown import table
from bench.harness.results import RESULTS, Result, read
from bench.paper import beside

PAGE = Path("docs/benchmarks.md")
PICTURES = Path("docs/figures")

HEAD = """# Benchmarks

<!-- Written by `python -m bench.tools.page` from the files in bench/results; not by hand. -->

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
        "\n".join([HEAD, *_contenders(), *_environments(results), *_better(results), *_sections(results)]),
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


def _better(results: list[Result]) -> Iterator[str]:
    yield "## Where another is better than Tune\n"
    yield (
        "Listed is who takes less than 0.99 of Tune's bytes, or less time in three rounds of four. In brackets stand "
        "its bytes or its time, as a fraction of Tune's. Who learns better is under classification.\n"
    )
    for result in results:
        module = module_of(result.benchmark)
        if hasattr(module, "cases"):
            sentences = better_than_tune(module.cases(result))
            yield "".join(f"- {_titled(result)}: {sentence}\n" for sentence in sentences)


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
        yield from module.tables(result)
        yield from beside(result)
        yield from (f"- {note}" for note in result.notes)
        picture = PICTURES / f"{result.benchmark}-{_device(result)}.png"
        picture.parent.mkdir(exist_ok=True)
        module.plot(result).savefig(picture, dpi=120)
        yield f"\n![{result.benchmark}](figures/{picture.name})\n"


if __name__ == "__main__":
    sys.exit(main())
