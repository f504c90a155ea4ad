"""Check that a closed explorer leaves nothing behind."""

import gc
import weakref

import pytest
from ipywidgets.widgets import widget as registry

from glmlens.widgets.chart import PlotlyLibrary


def leaves_nothing(make, result):
    """Assert that closing the explorer made by `make` frees its widgets, itself and its result.

    `result` returns the result of an explorer. A second close does nothing, and `select` raises.
    """
    PlotlyLibrary.model_id()  # made before the count of widgets: it stays open for the next chart
    gc.collect()
    before = set(registry._instances)
    explorer = make()
    result_reference = weakref.ref(result(explorer))
    explorer_reference = weakref.ref(explorer)
    explorer.close()
    explorer.close()
    assert set(registry._instances) == before
    gc.collect()
    assert result_reference() is None
    with pytest.raises(RuntimeError, match="closed"):
        explorer.select(layer=0)
    del explorer
    gc.collect()
    assert explorer_reference() is None
