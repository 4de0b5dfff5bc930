import pytest

from convbn_fx import kinds


@pytest.fixture(autouse=True)
def _tables(monkeypatch):
    """What a test registers is gone afterwards."""
    for table in ("CONVOLUTION_CLASSES", "BATCH_NORM_CLASSES", "ACTIVATION_CLASSES"):
        known = getattr(kinds.classes, table)
        monkeypatch.setattr(kinds.classes, table, kinds.classes.Classes(dict(known.rows), known.named))
