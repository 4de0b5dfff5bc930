"""What a benchmark leaves behind: its rows, and all that one needs to know to repeat it, as JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

#: Where the committed results lie.
RESULTS = Path("bench/results")


@dataclass(frozen=True)
class Options:
    """What the command line asks of a benchmark.

    Attributes:
        device: `cpu` or `cuda`.
        smoke: Toy sizes: does everything run?
        seconds: How long the contenders of one row take turns.
        seeds: How often what depends on chance is repeated.
        image_folder: Images of one's own, a folder a class, in the place of bundled data.
        checkpoint: A `state_dict` of one's own, in the place of a trained model.
        eps: Of its batch norms.
        part: Of an experiment that has several; none for all.
    """

    device: str = "cpu"
    smoke: bool = False
    seconds: float = 30.0
    seeds: int = 5
    image_folder: Path | None = None
    checkpoint: Path | None = None
    eps: float = 1e-5
    part: str = ""

    @property
    def turns(self) -> float:
        """Seconds that the contenders of one row really take turns: none in a smoke test."""
        return 0.0 if self.smoke else self.seconds


@dataclass(frozen=True)
class Result:
    """One run of a benchmark.

    Attributes:
        benchmark: Its name.
        command: What ran it.
        environment: Machine and versions.
        settings: Sizes, seeds, and whatever else the rows depend on.
        rows: What was measured, a dictionary of plain types a row; all rows have the same keys.
        notes: What a reader has to know beside the table, a sentence each.
    """

    benchmark: str
    command: str
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes the result as JSON: numbers to six digits, a list of numbers on one line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_six_digits(asdict(self)), indent=1, allow_nan=False)
        path.write_text(_NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n", encoding="utf-8")


_NUMBERS: Final = re.compile(r"\[[-+\d.e,\s]+\]")


def to_six_digits(value: Any) -> Any:
    """The value with every number in it rounded, as files have it."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: to_six_digits(each) for key, each in value.items()}
    return [to_six_digits(each) for each in value] if isinstance(value, list | tuple) else value


def read(path: Path) -> Result:
    """Reads what [`write`][bench.harness.results.Result.write] wrote.

    Args:
        path: The file.

    Returns:
        The result.
    """
    return Result(**json.loads(path.read_text(encoding="utf-8")))
