"""Knows the command line, and the files, pages and pictures that it writes. Needs the extra `cli`.

Nothing outside this folder may know of it.
"""


class Unusable(ValueError):
    """What was asked for cannot be done; the message says why, and what can."""
