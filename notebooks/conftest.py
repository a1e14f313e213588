"""nbval: progress bars write to stderr, which is therefore not compared; figures go to a temporary folder; stubs are left out."""

import atexit
import os
import shutil
import tempfile

collect_ignore_glob = ["exercises/*"]

_FIGURES = tempfile.mkdtemp(prefix="pdpo-figures-")
atexit.register(shutil.rmtree, _FIGURES, ignore_errors=True)
os.environ["PDPO_FIGURES_DIR"] = _FIGURES  # the notebooks' kernels inherit it


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
