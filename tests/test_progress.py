"""The line that says how far a pass is: drawn where it takes long, gone when it ends, and how long a run will take."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from pdpo import experiments
from pdpo import progress as module
from pdpo.models import Judge
from pdpo.presets import with_config
from pdpo.progress import progress


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
def test_how_long_a_run_will_take_is_said_once(hours, capsys, later, said):
    list(progress(range(2, 6), "dpo", done=2, later=later))
    out = capsys.readouterr().out
    assert said in out and out.count("minutes") == bool(said)


def test_in_a_notebook_and_for_a_short_run_the_bar_alone_says_it(hours, monkeypatch, capsys):
    monkeypatch.setattr(module, "in_notebook", lambda: True)
    list(progress(range(4), "dpo", later=0.0))
    monkeypatch.setattr(module, "in_notebook", lambda: False)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.0))
    list(progress(range(4), "dpo", later=59.0))
    assert capsys.readouterr().out == ""


def test_every_pass_over_data_shows_itself(drawn, quick, monkeypatch):
    names, real = set(), module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda items, name, **more: names.add(name) or real(items, name, **more))
    sft = experiments.run_sft(with_config(quick, micro_batch_size=2))  # a pass of one item has no line
    experiments.run_win_rate(experiments.run_preference(sft, method="odpo", beta=0.1, steps=2))
    experiments.run_reward_model(sft)
    expected = "sft|odpo beta=0.1|held-out loss|log-probabilities of the reference|sampling|sampling, tokens at most|KL"
    assert names >= {*expected.split("|"), "features of the reward model"}
    texts = [f"{i}" for i in range(1030)]
    judge = Judge(SimpleNamespace(encode=lambda part, **_: np.array([[float(text)] for text in part])))
    assert judge.embed(texts).flatten().tolist() == list(map(float, texts))
    assert "embedding by the judge" in names and " 0/3 " in drawn()


def test_a_training_says_how_long_it_will_take(hours, quick, capsys):
    experiments.run_sft(quick)  # 12 steps of an hour
    assert "sft: about 660 minutes on this machine\n" in capsys.readouterr().out
