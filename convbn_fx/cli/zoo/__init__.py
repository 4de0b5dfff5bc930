"""Knows many models at once: each is measured in a process of its own, and has one row of results.

The way of the data: names -> `architectures` -> `measuring` (one model) -> `isolation` (its process) -> `sweeping` (all
of them) -> `running` (into a file, watched) -> `results` (the CSV file) -> `summary` and `page`. Must not
know what a report of one model shows. Needs the extra `zoo`, too, for the models of torchvision and timm.
"""
