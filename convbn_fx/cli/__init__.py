"""Knows the command line, and the files, pages and pictures that it writes. Needs the extra `cli`.

Nothing outside this folder may know of it.
"""

from typing import Any


class Unusable(ValueError):
    """What was asked for cannot be done; the message says why, and what can."""


def html_page(template: str, **values: Any) -> str:
    """The HTML of a page that needs nothing but itself; all text in it is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("convbn_fx.cli", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)
