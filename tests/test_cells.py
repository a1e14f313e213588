"""What a cell shows: of a result one line, or a small table with a curve; of work that goes on a line that is gone at its end."""

import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import pdpo
from pdpo.cells import card, cell_line, curve, in_notebook, log_lines, progress_file
from pdpo.experiments import run_frontier, run_preference, run_reward_model, run_sft, run_win_rate
from pdpo.files import read_json
from pdpo.runner import stray


def is_one_line(text: str) -> bool:
    return "\n" not in text and 20 < len(text) < 200


def test_what_stages_give_and_data_are_one_line_each(quick):
    sft = run_sft(quick)
    dpo = run_preference(sft, method="dpo", beta=0.1)
    wins, frontier = run_win_rate(dpo), run_frontier([sft], method="dpo", betas=(0.1, 0.3))
    records = pdpo.load_split("toy")
    for shown in (sft, dpo, wins, frontier, run_reward_model(sft), *records, pdpo.pairs(records[0]), records[0][0]):
        assert is_one_line(repr(shown)), repr(shown)
    long = pdpo.Preference("a prompt " * 99, ("one\ntwo " * 99, "three " * 99))
    assert is_one_line(repr(long))
    kl = dpo.history[-1]["eval_kl"]
    assert repr(dpo) == f"<Run dpo beta=0.1 seed=0: 6 steps, KL {kl:.3g} nats>" and repr(sft) == "<Run sft seed=0: 12 steps>"
    assert repr(records[0]).startswith("<803 preferences, the first: <Preference ")
    assert f"win {wins.column('win').mean():.3g}" in repr(wins) and "0.1, 0.3" in repr(frontier)
    assert records[0] == list(records[0]) and type(pdpo.load_preferences("toy")[:2]) is list  # still a list


def test_a_run_in_a_cell_shows_its_settings_losses_kl_minutes_and_a_curve(quick):
    dpo = run_preference(run_sft(quick, seed=1), method="dpo", beta=0.1)
    html = dpo._repr_html_()
    losses = [row["eval_loss"] for row in dpo.history if "eval_loss" in row]
    values = dict(re.findall(r"<th[^>]*>(.*?)</th><td>(.*?)</td>", html))
    assert (values["method"], values["beta"], values["seed"], values["steps"]) == ("dpo", "0.1", "1", "6")
    assert values["held-out loss"] == f"{losses[0]:.3f} to {losses[-1]:.3f}" != "0.000 to 0.000"
    assert values["training loss"].endswith(f"to {dpo.history[-1]['loss']:.3f}")
    assert values["KL from the reference"] == f"{dpo.history[-1]['eval_kl']:.3g} nats a response"
    assert float(values["minutes"]) == pytest.approx(read_json(dpo.path / "stage.json")["environment"]["minutes"], rel=0.1)
    points = re.search(r"points='([^']*)'", html)[1].split()
    assert len(points) == len(losses)
    ET.fromstring(html)  # well formed
    assert "KL" not in run_sft(quick, seed=1)._repr_html_()
    for other in (run_win_rate(dpo), run_reward_model(dpo.sft)):
        ET.fromstring(other._repr_html_())


def test_a_curve_falls_where_its_values_fall_and_is_none_for_one_point():
    drawn = curve([0, 50, 100], [3.0, 2.0, 1.0], label="loss <b>", width=108, height=58)
    points = np.array([each.split(",") for each in re.search(r"points='([^']*)'", drawn)[1].split()], dtype=float)
    np.testing.assert_allclose(points, [[4, 4], [54, 29], [104, 54]])  # from the upper left: y grows downwards
    assert "loss &lt;b&gt;: 3 to 1" in drawn
    assert curve([1], [2.0], label="loss") == "" and "polyline" in curve([1, 2], [2.0, 2.0], label="flat")
    assert "&lt;i&gt;" in card("<i>", {"a": "b"})


# progress


BAR = """
import sys, time
from tqdm import tqdm
from pdpo.cells import progress_file
print("before")
for _ in tqdm(range(3), "stages", leave=False, mininterval=0, file=progress_file()):
    for _ in tqdm(range(3), "dpo beta=0.3", leave=False, mininterval=0, position=0, file=progress_file()):
        pass
print("after")
"""


def executed(monkeypatch, *sources: str) -> list[list]:
    """The outputs of cells in a kernel of their own, where somebody looks."""
    monkeypatch.setenv("PDPO_STATIC", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=100).execute()
    return [cell.outputs for cell in notebook.cells]


def test_a_notebooks_progress_is_no_stderr_and_leaves_nothing_behind(monkeypatch):
    outputs, (static,) = executed(monkeypatch, BAR, "import os\nos.environ['PDPO_STATIC'] = '1'" + BAR)
    assert [each.get("name") for each in outputs] == ["stdout", None, "stdout"]
    assert outputs[0].text == "before\n" and outputs[2].text == "after\n"
    assert dict(outputs[1].data) == {"text/plain": "", "text/html": ""}  # what was there has been taken back
    assert static.text == "before\nafter\n"


def test_a_process_that_has_ipykernel_but_no_cell_is_no_notebook(monkeypatch, capsys):
    import ipykernel  # noqa: F401 (as a test beside this one, or a library, may have done)

    assert not in_notebook()
    progress_file().write("\r 0%")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=None))
    assert in_notebook()


def test_where_ipywidgets_is_missing_no_red_warning_is_the_first_output(monkeypatch):
    source = "import sys\nsys.modules['ipywidgets'] = None\n{}import transformers, tqdm.auto\nprint('imported')"
    ((output,),) = executed(monkeypatch, source.format("import pdpo\n"))
    assert output.text == "imported\n"
    ((red, *_),) = executed(monkeypatch, "import sys\nsys.modules['ipywidgets'] = None\nimport tqdm.auto")
    assert "IProgress" in red.text  # else this test guards nothing


def test_a_cell_line_is_one_output_that_is_drawn_over(monkeypatch):
    shown = []
    monkeypatch.setattr("pdpo.cells._lines", {})

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    monkeypatch.setattr("IPython.display.display", lambda data, **_: shown.append(("new", data["text/html"])) or Handle())
    write = cell_line
    for text in ("\r", "\rone <b>", "\rtwo", "\r    ", "\r"):
        write(text)
    assert shown == [("new", "<pre style='margin:0'>one &lt;b&gt;</pre>"), "two", "", ""]


def test_a_log_gets_whole_lines_and_few_of_them(capsys, monkeypatch):
    moments = iter([0.0, 10.0, 61.0, 61.0, 70.0, 140.0, 140.0])
    monkeypatch.setattr("pdpo.cells.time.monotonic", lambda: next(moments))
    write = log_lines(60.0)
    for text in ("\r10%", "\r50%", "\r60%", "\r99%", "\r     \r"):
        write(text)
    assert capsys.readouterr().err == "50%\n99%\n"


def test_only_progress_may_stand_on_stderr():
    bars = "\rdpo beta=0.3:  50%|█████     | 1/2 [00:01<00:01,  1.3it/s]\r  \r3it [00:00, 9.1it/s]\n"
    bars += "\x1b[A\rsft: 100%|##| 2/2 [00:00<?, ?it/s]"
    assert stray(bars) == "" and stray("") == ""
    assert stray(bars + "\nTqdmWarning: IProgress not found.") == "TqdmWarning: IProgress not found."
    assert stray("warnings.warn(\n") and stray("50% of [a list]\n")
