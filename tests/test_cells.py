"""What a cell shows: of a result one line, or a small table with a curve; of work that goes on a line that is gone at its end.

That line in a terminal: drawn where a pass takes long, gone when it ends; and how long a run will take."""

import re
import sys
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import pdpo
from pdpo import progress as module
from pdpo.cells import card, curve, in_notebook, log_lines, progress_file
from pdpo.experiments import run_frontier, run_preference, run_reward_model, run_sft, run_win_rate
from pdpo.progress import progress
from pdpo.runner import stray


def test_what_stages_give_and_data_are_one_line_each(quick):
    sft = run_sft(quick)
    dpo = run_preference(sft, method="dpo", beta=0.1)
    wins, frontier, records = run_win_rate(dpo), run_frontier([sft], method="dpo", betas=(0.1, 0.3)), pdpo.load_split("toy")
    long = pdpo.Preference("a prompt " * 99, ("one\ntwo " * 99, "three " * 99))
    for shown in (sft, dpo, wins, frontier, run_reward_model(sft), *records, pdpo.pairs(records[0]), records[0][0], long):
        assert "\n" not in repr(shown) and 20 < len(repr(shown)) < 200
    kl = dpo.history[-1]["eval_kl"]
    assert repr(dpo) == f"<Run dpo beta=0.1 seed=0: 6 steps, KL {kl:.3g} nats>" and repr(sft) == "<Run sft seed=0: 12 steps>"
    assert repr(records[0]).startswith("<803 preferences, the first: <Preference ")
    assert f"win {wins.column('win').mean():.3g}" in repr(wins) and "0.1, 0.3" in repr(frontier)


def test_a_run_in_a_cell_shows_its_settings_losses_kl_minutes_and_a_curve(quick):
    dpo = run_preference(run_sft(quick, seed=1), method="dpo", beta=0.1)
    html = dpo._repr_html_()
    losses = [row["eval_loss"] for row in dpo.history if "eval_loss" in row]
    values = dict(re.findall(r"<th[^>]*>(.*?)</th><td>(.*?)</td>", html))
    assert (values["method"], values["beta"], values["seed"], values["steps"]) == ("dpo", "0.1", "1", "6")
    assert values["held-out loss"] == f"{losses[0]:.3f} to {losses[-1]:.3f}" != "0.000 to 0.000"
    assert values["KL from the reference"] == f"{dpo.history[-1]['eval_kl']:.3g} nats a response"
    assert len(re.search(r"points='([^']*)'", html)[1].split()) == len(losses)
    for each in (dpo, dpo.sft, run_win_rate(dpo), run_reward_model(dpo.sft)):
        ET.fromstring(each._repr_html_())  # well formed


def test_a_curve_falls_where_its_values_fall_and_is_none_for_one_point():
    drawn = curve([0, 50, 100], [3.0, 2.0, 1.0], label="loss <b>", width=108, height=58)
    assert "points='4.0,4.0 54.0,29.0 104.0,54.0'" in drawn  # from the upper left: y grows downwards
    assert "loss &lt;b&gt;: 3 to 1" in drawn and "&lt;i&gt;" in card("<i>", {"a": "b"})
    assert curve([1], [2.0], label="loss") == "" and "polyline" in curve([1, 2], [2.0, 2.0], label="flat")


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
    source = "import sys\nsys.modules['ipywidgets'] = None\nimport pdpo\nimport transformers, tqdm.auto\nprint('imported')"
    ((output,),) = executed(monkeypatch, source)
    assert output.text == "imported\n"


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


# how far a pass is


@pytest.fixture
def drawn(monkeypatch, capsys):
    """What is drawn where passes count as long from the start."""
    monkeypatch.setattr(module, "DELAY", 0.0)
    monkeypatch.setattr(module, "progress_file", lambda: sys.stderr)  # as on a terminal
    return lambda: capsys.readouterr().err


@pytest.fixture
def hours(monkeypatch):
    """A clock on which every item takes an hour."""
    now = iter(range(0, 10**6, 3600))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(now)))


def test_a_short_pass_and_one_of_another_process_draw_nothing(capsys, monkeypatch):
    assert list(progress([3, 4], "counting")) == [3, 4]
    monkeypatch.setattr(module, "DELAY", 0.0)
    assert list(progress([3, 4], "counting", hidden=True)) == [3, 4]
    assert list(progress([3], "counting")) == [3]
    monkeypatch.setattr(module, "launch_rank", lambda: 1)
    assert list(progress([3, 4], "counting")) == [3, 4]
    assert capsys.readouterr() == ("", "")


def test_a_long_pass_is_drawn_before_its_first_item_ends_and_leaves_an_empty_line(drawn):
    seen = ""
    for _ in progress(range(2, 4), "counting", done=2):
        while "counting" not in seen:  # the timer draws it
            seen += drawn()
    assert "counting:  50%" in seen and " 2/4 " in seen
    assert re.search(r"\r *\r$", drawn())


@pytest.mark.parametrize("later, said", [(0.0, "about 180 minutes"), (7200.0, "about 300 minutes"), (None, "")])
def test_how_long_a_run_will_take_is_said_once_and_in_a_notebook_by_the_bar_alone(hours, monkeypatch, capsys, later, said):
    list(progress(range(2, 6), "dpo", done=2, later=later))
    out = capsys.readouterr().out
    assert said in out and out.count("minutes") == bool(said)
    monkeypatch.setattr(module, "in_notebook", lambda: True)
    list(progress(range(2, 6), "dpo", done=2, later=later))
    assert capsys.readouterr().out == ""


def test_a_training_says_how_long_it_will_take(hours, quick, capsys):
    run_sft(quick)  # 12 steps of an hour
    assert "sft: about 660 minutes on this machine\n" in capsys.readouterr().out
