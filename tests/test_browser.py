"""JupyterLab in a headless Chromium, as a reader meets it: opened, run from the menu, looked at. `make browser` installs what it can.

Screenshots are left in runs/browser, which git ignores.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ROOT, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser")
pytestmark = pytest.mark.slow

SCREENSHOTS = ROOT / "runs" / "browser"
RED = "[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']"
SETTINGS = {  # all cells are drawn, also those far below; no questions
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome", "chrome")
        own, system = playwright.chromium.executable_path, next(filter(None, map(shutil.which, names)), None)
        if not os.path.exists(own) and system is None:
            pytest.skip("no Chromium on this machine: make browser, or install the package chromium")
        path = own if os.path.exists(own) else system
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on copies of the notebooks, with the stages of PDPO_TEST_RUNS_DIR where it is set."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("00_start_here", "03_kl_constrained_optimum", "exercises/ex_01_gumbel_and_bradley_terry"):
        (target := folder / f"{name}.ipynb").parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", target)
    for name, value in SETTINGS.items():
        file = folder / ".settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "PDPO_RUNS_DIR": os.environ.get("PDPO_TEST_RUNS_DIR") or str(folder / "runs"),
        "PDPO_FIGURES_DIR": str(folder / "figures"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_CONFIG_DIR": str(folder / ".config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces"),
    }
    options = [f"--ServerApp.port={port}", "--IdentityProvider.token=test", f"--ServerApp.root_dir={folder}", "--allow-root"]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", *options], env=os.environ | own, stdout=log, stderr=log
        )

    def answers() -> bool:
        assert server.poll() is None, (folder / "lab.log").read_text()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=test").status == 200
        except OSError:
            return False

    try:
        wait_until(answers)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}.ipynb?token=test&reset"
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture
def run_all(browser, lab):
    """Function of a notebook's name: opens it, runs all its cells from the menu, waits for the last; the page."""
    pages = []

    def run(name: str, *, seconds: float = 600.0):
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        pages.append((page, name))
        page.goto(lab.format(name))
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", state="attached", timeout=120_000)
        page.wait_for_timeout(5000)  # JupyterLab asks for a kernel where it is told to run while it connects to one
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_selector(".jp-InputPrompt:text('[*]')", state="attached", timeout=60_000)
        end = time.monotonic() + seconds
        while any("*" in prompt for prompt in page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()):
            assert time.monotonic() < end, f"{name} is still running"
            page.wait_for_timeout(500)
        page.wait_for_timeout(1000)  # for the last output to be drawn
        return page

    yield run
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for page, name in pages:
        for number, cell in enumerate(page.locator(".jp-OutputArea-output img").all()[:2]):
            cell.scroll_into_view_if_needed()
            page.screenshot(path=SCREENSHOTS / f"{name.replace('/', '_')}_{number}.png")
        page.close()


def prompts(page) -> list[str]:
    return [text.strip() for text in page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()]


def red(page) -> list[str]:
    return page.locator(f".jp-Notebook :is({RED})").all_inner_texts()


@pytest.mark.parametrize("name", ["00_start_here", "03_kl_constrained_optimum"])
def test_a_chapter_runs_from_the_menu_and_shows_its_figures_and_nothing_red(run_all, name):
    page = run_all(name)
    assert prompts(page) == [f"[{number}]:" for number in range(1, len(prompts(page)) + 1)]
    widths = page.locator(".jp-OutputArea-output img").evaluate_all("images => images.map(each => each.naturalWidth)")
    assert widths and min(widths) > 300
    assert red(page) == []
    empty = page.locator(".jp-OutputArea-output").evaluate_all(
        "all => all.filter(each => each.offsetHeight > 200 && !each.innerText.trim() && !each.querySelector('img, svg, canvas')).length"
    )
    assert empty == 0


def test_an_exercise_stops_at_its_first_stub_and_says_what_to_do(run_all):
    page = run_all("exercises/ex_01_gumbel_and_bradley_terry")
    (error,) = red(page)
    assert "Your turn: write gumbel_noise" in error and "Stuck? hint('gumbel_noise')" in error
    page.locator(".jp-OutputArea-output", has_text="Your turn").scroll_into_view_if_needed()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "exercise.png")
