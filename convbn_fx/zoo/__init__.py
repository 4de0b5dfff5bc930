"""Many models at once: measure each in a process of its own, and keep one row of results for each.

The way of the data: names -> `architectures` -> `measuring` (one model) -> `isolation` (its process) -> `sweeping` (all
of them) -> `running` (into a file, watched) -> `results` (the CSV file) -> `summary` and `page`. Needs the extra `cli`,
and `zoo` for the models of torchvision and timm.
"""
