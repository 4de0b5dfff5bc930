"""How the page of the benchmarks opens, and what it folds away."""

from bench.harness.contenders import DEPLOY, EVAL, TUNE
from bench.harness.results import Result
from bench.tools import page


def row(model, contender, bytes_, seconds):
    return {
        "model": model,
        "contender": contender,
        "bytes": {"4": bytes_},
        "seconds": None if seconds is None else [seconds] * 3,
    }


def test_it_opens_with_a_picture_and_three_sentences(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PICTURES", tmp_path)
    rows = [
        row("net", EVAL, 100, 1.0),
        row("net", TUNE, 40, 0.9),
        row("net", DEPLOY, 50, 0.8),
        row("net", "Inplace-ABN", None, None),
    ]
    settings = {"batches": [4], "image": 224}
    picture, sentences = page._overview([Result("alternatives", "", {}, settings, rows)])
    assert (tmp_path / "overview.png").exists()
    assert "figures/overview.png" in picture
    assert sentences == (
        "Tune takes, as shares of Eval's at 4x224, 40% of the bytes and 90% of the time in net. "
        "The fewest bytes between forward and backward are held by net's Tune. The fastest is net's Deploy.\n"
    )


def test_a_fold_holds_markdown():
    assert page._fold("Long", "| a |\n") == (
        '<details markdown="1">\n<summary>Long</summary>\n\n| a |\n\n</details>\n'
    )
