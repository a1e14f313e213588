"""nbval: figures go to a temporary folder; stubs are left out; a cell that writes to stderr fails, unless it is progress."""

import atexit
import os
import shutil
import tempfile

import pytest

from pdpo.runner import stray

collect_ignore_glob = ["exercises/*"]

_FIGURES = tempfile.mkdtemp(prefix="pdpo-figures-")
atexit.register(shutil.rmtree, _FIGURES, ignore_errors=True)
os.environ["PDPO_FIGURES_DIR"] = _FIGURES  # the notebooks' kernels inherit both
os.environ["PDPO_STATIC"] = "1"  # nobody looks: no sliders, no progress


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Also in cells whose output is not compared: what a reader sees red is a fault."""
    result = yield
    written = "".join(each.text for each in getattr(item, "test_outputs", None) or () if each.get("name") == "stderr")
    assert not stray(written), f"this cell writes to stderr:\n{stray(written)}"
    return result
