"""The experiments, in the order of the page: each is a file here, with `run`, `tables` and `plot`."""

#: Names as the command line, the Makefile and the results have them.
EXPERIMENTS = (
    "resnet50-grid",
    "classification",
    "detection",
    "adversarial",
    "pretraining",
    "alternatives",
    "coefficients",
    "theory",
    "costs",
    "kernels",
    "gpu",
)

#: Of the experiment on a GPU: what fits a sitting of nine minutes each.
PARTS = ("eager", "graphs", "compiled")
