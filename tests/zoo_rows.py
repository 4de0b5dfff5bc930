"""Rows of a sweep that nobody ran, for the summary and the page."""

import random
from dataclasses import replace

from convbn_fx.cli.zoo.results import Level, Row, Status

#: What a model's name, or an exception, may hold to break a page that does not escape it.
HOSTILE = """</td></script><script>window.broken=1</script><img src=x onerror="window.broken=1">'"&amp;{{ 7 * 7 }}"""


def row(name, **values):
    values = {"family": "timm.resnet", "status": Status.PASS, "level": Level.NUMERIC} | values
    return Row(name=name, **values)


def measured(name, *, kept=1000, tune=600, deploy=600, **values):
    values = {
        "parameters": 1_500_000,
        "batch_norms": 10,
        "fused": 10,
        "refused": {},
        "input": "2x3x224x224",
        "output_error": 1e-15,
        "gradient_error": 2e-15,
        "float32_error_tune": 1e-6,
        "float32_error_eval": 2e-6,
        "seconds": 3.5,
    } | values
    return row(name, bytes_eval=kept, bytes_tune=tune, bytes_deploy=deploy, **values)


def many(count):
    """As many rows as a zoo has, of forty families; always the same ones."""
    draw = random.Random(count)
    rows = []
    for number in range(count):
        family = f"zoo.family_{number % 40}"
        name = f"zoo:model_{number}_patch16_224.augreg_in21k"
        kept, part, fused = draw.randrange(10**6, 10**9), draw.uniform(0.5, 0.9), draw.randrange(1, 200)
        each = measured(
            name,
            kept=kept,
            tune=int(kept * part),
            deploy=int(kept * part * 0.97),
            family=family,
            parameters=draw.randrange(10**6, 10**9),
            batch_norms=fused + number % 3,
            fused=fused,
            refused={"NOT_AFTER_CONVOLUTION": number % 3} if number % 3 else {},
            output_error=draw.uniform(1e-16, 1e-13),
            gradient_error=draw.uniform(1e-15, 1e-12),
            seconds=draw.uniform(1, 100),
        )
        if number % 40 >= 25:
            each = replace(each, batch_norms=0, fused=0, refused={}, bytes_tune=kept, bytes_deploy=kept)
        if number % 100 == 99:
            each = row(name, family=family, status=Status.TIMEOUT, detail="stopped after 600 s")
        rows.append(each)
    return rows
