"""Rows of results files: one that is easily varied, and the strategy that draws any."""

from hypothesis import strategies as st

from convbn_fx import SkipReason
from convbn_fx.cli.zoo.results import Level, Row, Status

#: A row as measuring `numeric` fills it, no cell of it at a limit of the gate.
FULL = Row(
    name="timm:resnet50",
    family="timm.resnet",
    status=Status.PASS,
    level=Level.NUMERIC,
    parameters=25557032,
    batch_norms=54,
    fused=53,
    refused={"NOT_AFTER_CONVOLUTION": 1},
    input="2x3x224x224",
    bytes_eval=200000,
    bytes_tune=120000,
    bytes_deploy=100000,
    output_error=3e-14,
    gradient_error=2e-14,
    float32_error_tune=2e-6,
    float32_error_eval=1e-6,
    seconds=12.3,
)

# What writing makes of any text: one line, single spaces. Half a surrogate pair cannot be written as UTF-8.
_words = st.text(st.characters(exclude_categories=["Cs"])).map(lambda text: " ".join(text.split()))
_awkward = st.sampled_from(
    ['a,b"c', '"', "caf\u00e9 \u2028 \u96ea", "[red]a[/red] :smile:", "none", "\0", "a:1"]
)
texts = st.just("") | _words | _awkward.map(lambda text: " ".join(text.split()))
names = st.sampled_from([f"timm:{letter}" for letter in "abcdef"]) | texts.filter(bool)
counts = st.integers(0, 300) | st.integers(0, 10**30)
errors = st.floats().map(lambda error: float(f"{abs(error):.2e}"))
reasons = st.dictionaries(st.sampled_from([reason.name for reason in SkipReason]), counts, max_size=4)


def optional(strategy):
    return st.none() | strategy


def rows(name=names):
    """Any row whose numbers have no more digits than the file."""
    return st.builds(
        Row,
        name=name,
        family=texts,
        status=st.sampled_from(Status),
        level=st.sampled_from(Level),
        parameters=optional(counts),
        batch_norms=optional(counts),
        fused=optional(counts),
        refused=optional(reasons),
        input=texts,
        bytes_eval=optional(counts),
        bytes_tune=optional(counts),
        bytes_deploy=optional(counts),
        output_error=optional(errors),
        gradient_error=optional(errors),
        float32_error_tune=optional(errors),
        float32_error_eval=optional(errors),
        seconds=optional(st.floats().map(lambda seconds: float(f"{abs(seconds):.1f}"))),
        detail=texts,
    )


def tables(**options):
    """Any rows of one file: no model twice."""
    return st.lists(rows(), max_size=5, unique_by=lambda row: row.name, **options)
