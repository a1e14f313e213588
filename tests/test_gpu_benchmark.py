"""benchmarks/gpu.py: every part runs on a CPU at a tiny size, and a part that breaks costs its own rows alone."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).resolve().parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import gpu  # noqa: E402

BREAK = f"""
import json, os, signal, subprocess, sys, time
sys.path.insert(0, {BENCHMARKS!r})
import gpu, gpu_work

def one(then):
    def part(work):
        'A part that leaves a row and then breaks.'
        yield {{"row": 1}}
        then()
        yield {{"row": 2}}
    return part

def stuck():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(sys.argv[1] + "/child", "w").write(str(child.pid))
    time.sleep(600)

def fine(work):
    'A part that ends well.'
    yield {{"row": 1}}
    yield gpu_work.attempt({{"row": 2}}, lambda: 1 / 0)

gpu.DRY_SECONDS = 8
gpu.PARTS = {{
    "raises": gpu.Part(one(lambda: [][1]), 0), "hangs": gpu.Part(one(stuck), 0),
    "killed": gpu.Part(one(lambda: os.kill(os.getpid(), signal.SIGKILL)), 0), "fine": gpu.Part(fine, 0),
}}
sys.exit(gpu.main(["--dry-run", "--out", sys.argv[1]]))
"""


def test_a_part_that_raises_hangs_or_is_killed_costs_its_own_rows(tmp_path, python):
    process = python("-c", BREAK, str(tmp_path))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "raises": "IndexError: list index out of range", "hangs": "stopped at its limit of 8 s",
        "killed": "killed by SIGKILL", "fine": "done",
    }  # fmt: skip
    assert all(parts[name]["rows"] == [{"row": 1}] for name in ("raises", "hangs", "killed"))
    assert parts["fine"]["rows"] == [{"row": 1}, {"row": 2, "failed": "ZeroDivisionError: division by zero"}]
    assert "IndexError" in parts["raises"]["log"]
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not child.exists() or " Z " in child.read_text()  # what a part has started ends with it
    page = (tmp_path / "gpu.md").read_text()
    assert "hangs: stopped at its limit" in page and "not calculated" in page and page in out


@pytest.mark.slow
def test_the_dry_run_goes_through_every_part_and_shows_what_holds_on_a_cpu_too(tmp_path, python):
    process = python(f"{BENCHMARKS}/gpu.py", "--dry-run", "--out", str(tmp_path), PDPO_DATA_DIR=None)
    _, err = process.communicate()
    assert process.returncode == 0, err
    report, page = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(gpu.PARTS, "done")
    rows = {name: part["rows"] for name, part in report["parts"].items()}
    assert all(rows.values()) and not [row for part in rows.values() for row in part if "failed" in row]
    assert "a dry run" in page and page.count("### ") >= len(gpu.PARTS) and "no table" not in page
    here, t4 = report["full preset"]
    assert here["where"] == "here" and t4["where"] == "T4, calculated" and min(each["all, minutes"] for each in (here, t4)) > 0
    fast = next(row for row in rows["agreement"] if (row["precision"], row["path"]) == ("float32", "fast"))
    assert 0 < fast["gradient, of plain float32's"] < 1e-5
    assert [row["same bits as an unbroken run"] for row in rows["checkpoint"]] == [True]
    assert rows["checkpoint"][0]["went on after step"] in (1, 2, 3)
    assert "going on with" in rows["memory"][-1]["it said"]
    assert rows["one_process"][0]["backend"] == "gloo" and rows["one_process"][0]["losses differ by"] < 1e-5
    assert {row["way"] for row in rows["trees"]} == {"as it is", "torch.compile", "FlexAttention"}
    assert all(row["logps differ by, nats"] < 0.05 for row in rows["trees"])


def test_the_minutes_of_the_full_preset_by_hand():
    """Steps of 10 GFLOP, 2 of them in the head, at half of a rate of 100 GFLOP/s; stages that take 7 + 1 a step and 2 a measurement."""
    step = {"FLOP": 10e9, "of them head": 2e9, "s/step": 0.2}
    steps = [step | {"path": "fast", "precision": precision} for precision in ("float32", "float16")]
    stages = [(name, k, 7 + 0.2 * k + 2 * (k + 1)) for name in ("sft", "dpo-beta0.1") for k in (2, 4)]
    stages += [("win_rate-sft", 1, 30.0), ("reward_model", 2, 12.0)]
    facts = {"precision": "float16", "weights": 2.4e9, "training pairs": 240} | {
        f"FLOP/s of a matrix product, {precision}": 100e9 for precision in ("float32", "float16")
    }
    rows = {
        "setup": [{"what": key, "value": value} for key, value in facts.items()],
        "preference": [row | {"pairs": 8, "template": "pdpo"} for row in steps],
        "sft": steps,
        "sweep": [{"stage": f"{name}-seed0", "steps": k, "s": seconds} for name, k, seconds in stages],
    }
    here, t4 = gpu.full_preset({name: {"rows": part} for name, part in rows.items()})
    # 180 steps and 11 measurements of SFT; 8 runs of 230 steps and 11 measurements; 21 win rates
    assert here["sft, minutes"] == pytest.approx((7 + 11 * 2 + 180 * 0.2) / 60)
    assert here["preference, minutes"] == pytest.approx(8 * (7 + 11 * 2 + 230 * 0.2) / 60)
    passes = 2 * 240 / 8 / 3
    assert here["win rates and reward model, minutes"] == pytest.approx((21 * 30 + 12 + passes * 0.2) / 60)
    # a T4: a host half as fast; 8 GFLOP at half of 32.5 TFLOP/s, 2 at half of 4.05, and 66 bytes a weight at 240 GB/s
    seconds = 8e9 / (0.5 * 32.5e12) + 2e9 / (0.5 * 4.05e12) + 66 * 2.4e9 / 240e9
    assert t4["s a preference step"] == pytest.approx(seconds) and seconds > 0.4
    assert t4["sft, minutes"] == pytest.approx((2 * (7 + 11 * 2) + 180 * seconds) / 60)
    rows["preference"] = []
    assert "not calculated" in gpu.full_preset({name: {"rows": part} for name, part in rows.items()})[0]["note"]
