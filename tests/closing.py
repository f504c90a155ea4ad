"""What an explorer leaves when it is closed."""

import gc
import weakref

import pytest
from ipywidgets.widgets import widget as registry

from glmlens.widgets.chart import PlotlyLibrary


def leaves_nothing(make, result):
    """Nothing is left of the explorer that `make` makes: no widget, not itself, and not what it had computed;
    what is closed stays so."""
    PlotlyLibrary.model_id()  # plotly.js stays for the next chart
    gc.collect()
    before = set(registry._instances)
    explorer = make()
    held, gone = weakref.ref(result(explorer)), weakref.ref(explorer)
    explorer.close()
    explorer.close()
    assert set(registry._instances) == before
    gc.collect()
    assert held() is None
    with pytest.raises(RuntimeError, match="closed"):
        explorer.select(layer=0)
    del explorer
    gc.collect()
    assert gone() is None
