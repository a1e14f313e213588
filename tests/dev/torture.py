"""A long campaign against what must never happen: a wrong result that says nothing, a traceback, a hang. `make torture`.

    python tests/dev/torture.py [--seed 0] [--scale 1.0] [--only kills flips disks inputs fuzz]

Every trial runs in a process of its own, forked from this one (so that nothing is imported again), on a preset that trains in a
second. What a trial may end in: the same bits as undisturbed, or one line that begins with "error:" and exit status 2.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
os.environ |= {"PDPO_WORKERS": "1", "HF_HUB_OFFLINE": "1", "PDPO_PRESET": "tiny"}

import stages  # noqa: E402
import torch  # noqa: E402

from pdpo import __main__, data, experiments, toy, trees  # noqa: E402

LIMIT = 120  # seconds after which a trial counts as hung
FOLDER = Path(tempfile.mkdtemp(prefix="pdpo-torture-"))


@dataclass
class Ended:
    """How a child ended: exit status (negative: a signal), what it printed, what it gave."""

    status: int
    said: str
    result: object
    hung: bool = False


def in_child(function, *, kill_after: float | None = None, file_limit: int | None = None) -> Ended:
    """function() in a fork of this process; its result must be JSON."""
    gave, said = FOLDER / "gave", []
    gave.unlink(missing_ok=True)
    heard, speaks = os.pipe()  # not a file, which a full disk would cut short
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(speaks, "w") as out:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            status = 1
            try:
                if file_limit is not None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                result = function()
                if file_limit is None:
                    gave.write_text(json.dumps(result))
                status = result if isinstance(result, int) else 0
            except SystemExit as stop:  # argparse has said what is wrong
                status = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
    os.close(speaks)
    listening = threading.Thread(target=lambda: said.extend(iter(lambda: os.read(heard, 65536), b"")), daemon=True)
    listening.start()
    end, killed = time.monotonic() + (LIMIT if kill_after is None else kill_after), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end and not killed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            killed = True
        time.sleep(0.002)
    listening.join(timeout=10)  # a grandchild could hold the pipe open
    os.close(heard)
    text = b"".join(said).decode(errors="replace")
    result = json.loads(gave.read_text()) if gave.exists() else None
    return Ended(os.waitstatus_to_exitcode(status), text, result, hung=killed and kill_after is None)


def digest(*folders: Path) -> str:
    """Of all that a user would read of these stages, but for minutes and memory."""
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name not in ("stage.json", "report.html"):
                found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def chain(runs: Path) -> str:
    """SFT, ODPO on a reward model's scores, win rate; the digest of what came of it."""
    os.environ["PDPO_RUNS_DIR"] = str(runs)
    torch.set_num_threads(1)
    preset = stages.preset(FOLDER / "data")
    sft = experiments.run_sft(preset)
    unscored = [data.Preference(each.prompt, each.responses) for each in data.pairs(data.load_split(preset.data)[0])][:60]
    odpo = experiments.run_preference(sft, method="odpo", beta=0.1, records=unscored)
    dpo = experiments.run_preference(sft, method="dpo", beta=0.1)
    wins, model = stages.run_win_rate(run=dpo), experiments.run_reward_model(sft)
    weights = [each.load_policy().state_dict() for each in (sft, odpo, dpo)]
    seen = [each.history for each in (sft, odpo, dpo)], wins.rows, model.held_out.tolist()
    bits = [value.numpy().tobytes() for each in weights for value in each.values()]
    return hashlib.sha256(json.dumps(seen).encode() + b"".join(bits)).hexdigest()


def kills(count: int, rng: random.Random, pristine: Path, expected: str, seconds: float):
    """SIGKILL at a random moment, once or twice, then the same call."""
    for _ in range(count):
        runs, when = FOLDER / "killed", [rng.uniform(0, seconds) for _ in range(rng.choice((1, 1, 2)))]
        shutil.rmtree(runs, ignore_errors=True)
        for each in when:
            in_child(lambda: chain(runs), kill_after=each)  # noqa: B023
        yield f"killed after {[round(each, 3) for each in when]} s", in_child(lambda: chain(runs)), expected  # noqa: B023


def flips(count: int, rng: random.Random, pristine: Path, expected: str, seconds: float):
    """A byte changed, a file cut, emptied, deleted or grown, in what finished or half-finished stages left behind."""
    for _ in range(count):
        runs = FOLDER / "flipped"
        shutil.rmtree(runs, ignore_errors=True)
        if rng.random() < 0.3:  # a stage that was killed: its checkpoint is among the files
            in_child(lambda: chain(runs), kill_after=rng.uniform(0.3, 1) * seconds)  # noqa: B023
        if not runs.exists():
            shutil.copytree(pristine, runs)
        kinds = collections.defaultdict(list)
        for each in sorted(runs.rglob("*")):
            if each.is_file() and each.suffix != ".lock":
                kinds[each.name.split("-")[0]].append(each)
        if not kinds:
            continue
        file = rng.choice(kinds[rng.choice(sorted(kinds))])
        content, how = file.read_bytes(), rng.choice(("flip", "flip", "flip", "cut", "empty", "delete", "grow", "swap"))
        at = rng.randrange(max(len(content), 1))
        if how == "flip" and content:
            file.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
        elif how == "cut":
            file.write_bytes(content[:at])
        elif how == "delete":
            file.unlink()
        elif how == "grow":
            file.write_bytes(content + rng.randbytes(3))
        elif how == "swap":  # with another file of that kind
            file.write_bytes(rng.choice(kinds[file.name.split("-")[0]]).read_bytes())
        else:
            file.write_bytes(b"")
        yield f"{how} at {at}: {file.relative_to(runs)}", in_child(lambda: chain(runs)), expected  # noqa: B023


def train(runs: Path, *arguments: str) -> int:
    """The command line's train, with the stand-in for SBERT."""
    os.environ["PDPO_RUNS_DIR"] = str(runs)
    experiments.load_judge = lambda *_, **__: stages.Judge()
    quick = ["--preset", "small", "--sft-steps", "4", "--steps", "3", "--method", "dpo", "--data", str(FOLDER / "mine.jsonl")]
    return __main__.main(["train", *quick, *arguments])


def disks(count: int, rng: random.Random, pristine: Path, expected: str, seconds: float):
    """A disk that is full (no file may grow beyond so many bytes), then has room again."""
    reference = FOLDER / "room"
    in_child(lambda: train(reference, "--out", str(FOLDER / "room_out")))
    whole = digest(FOLDER / "room_out")
    largest = max(file.stat().st_size for file in reference.rglob("*") if file.is_file())
    for i in range(count):
        runs, out = FOLDER / "full", FOLDER / f"full_out{i}"
        shutil.rmtree(runs, ignore_errors=True)
        limit = int(largest ** rng.uniform(0.3, 1.0))
        full = in_child(lambda: train(runs, "--out", str(out)), file_limit=limit)  # noqa: B023
        yield f"files of at most {limit} bytes", full, "error or done"
        after = in_child(lambda: train(runs, "--out", str(out)))  # noqa: B023
        if full.status != 0:  # else the folder is there already
            after.result = digest(out) if out.is_dir() else "nothing was saved"
            yield f"room again after {limit} bytes", after, whole


def inputs(count: int, rng: random.Random, pristine: Path, expected: str, seconds: float):
    """Flags, rows and files that nobody should give."""
    rows = [json.loads(line) for line in (FOLDER / "mine.jsonl").read_text().splitlines()]
    odd = [None, True, -1, 0, 2**70, 1e308, float("nan"), "", " ", "\0", "\ud800", "x" * 2_000_000]
    odd += [[], {}, [[]], "é" * 50, "<|endoftext|>"]
    numbers = ["0", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "2**3", "", "abc", str(2**70), "١"]
    flags = ["--beta", "--lr", "--steps", "--sft-steps", "--seed"]
    (FOLDER / "junk").mkdir(exist_ok=True)
    (FOLDER / "junk" / "config.json").write_bytes(rng.randbytes(300))
    for i in range(count):
        runs, kind = FOLDER / "odd", rng.choice(("flag", "row", "bytes", "place"))
        if kind == "flag":
            given = [rng.choice(flags), rng.choice(numbers)]
        elif kind == "row":
            changed = [dict(row) for row in rows]
            for _ in range(rng.choice((1, 3, len(rows)))):
                row = rng.choice(changed)
                row[rng.choice(["prompt", "chosen", "rejected", "chosen_score", "rejected_score", "other"])] = rng.choice(odd)
            file = FOLDER / f"odd{i}.jsonl"
            file.write_text("\n".join(map(json.dumps, changed)))
            given = ["--data", str(file), "--method", rng.choice(("dpo", "odpo", "sft"))]
        elif kind == "bytes":
            content = bytearray((FOLDER / "mine.jsonl").read_bytes()[: rng.randrange(8000)])
            for _ in range(rng.randrange(20)):
                if content:
                    content[rng.randrange(len(content))] = rng.randrange(256)
            file = FOLDER / f"odd{i}.jsonl"
            file.write_bytes(content)
            given = ["--data", str(file)]
        else:
            places = ["/dev/null", "/dev/zero", str(FOLDER / "mine.jsonl" / "x"), str(FOLDER / "junk"), "a" * 300, ""]
            places.append("/proc/self")
            given = [rng.choice(("--out", "--model", "--tokenizer", "--data")), rng.choice(places)]
        yield f"{kind}: {str(given)[:100]}", in_child(lambda: train(runs, *given)), "error or done"  # noqa: B023


def fuzz(count: int, rng: random.Random, pristine: Path, expected: str, seconds: float):
    """Losses stay finite, trees equal the plain path, the loader gives records or a ValueError, on random input."""

    def trial(seed: int) -> str:
        from pdpo import losses, models, training
        from pdpo.encoding import Encoded

        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        logps = [-torch.rand(8, generator=generator) * 10 ** rng.uniform(-3, 4) for _ in range(4)]
        beta, offset = 10 ** rng.uniform(-3, 2), torch.randn(8, generator=generator) * 10 ** rng.uniform(-3, 2)
        for found in (losses.dpo_loss(*logps, beta=beta, offset=offset), losses.ipo_loss(*logps, beta=beta)):
            assert found.losses.isfinite().all() and (found.losses >= 0).all()
        tokenizer = models.train_tokenizer(toy.load()[::100], vocab_size=300)
        policy = models.load_policy(stages.preset(FOLDER / "data"), tokenizer=tokenizer, seed=seed % 5)
        shared = [rng.randrange(250) for _ in range(rng.randrange(1, 20))]
        sequences = []
        for _ in range(rng.randrange(1, 9)):
            ids = shared[: rng.randrange(1, len(shared) + 1)] + [rng.randrange(250) for _ in range(rng.randrange(1, 20))]
            sequences.append(Encoded(ids, rng.randrange(1, len(ids))))
        rows = [training.Row((each,)) for each in sequences]
        with torch.no_grad():
            plain, fast = training.policy_logps(policy, rows)[:, 0], trees.tree_logps(policy, sequences)
        assert (plain - fast).abs().max() < 1e-4, (plain, fast)
        file = FOLDER / "fuzz.json"
        text = json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        file.write_text("".join(rng.choice('[]{}",:ab1 ') if rng.random() < 0.1 else each for each in text))
        with contextlib.suppress(ValueError):
            assert all(isinstance(each, data.Preference) for each in data.load_preferences(file))
        return "fine"

    for _ in range(count):
        seed = rng.randrange(2**31)
        yield f"seed {seed}", in_child(lambda: trial(seed)), "fine"  # noqa: B023


CAMPAIGN = {kills: 200, flips: 200, disks: 40, inputs: 100, fuzz: 100}


def verdict(ended: Ended, expected: str) -> str:
    """survived, or what went wrong."""
    if ended.hung:
        return "hang"
    if "Traceback (most recent call last)" in ended.said:
        return "traceback"
    if expected == "error or done":
        errors = [
            line for line in ended.said.splitlines() if line.startswith(("error: ", "__main__.py: error", "python -m pdpo"))
        ]
        return "survived" if ended.status == 0 or (ended.status == 2 and errors) else f"status {ended.status}"
    return "survived" if ended.result == expected else "silently wrong"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="how many of the trials; 1 is all")
    parser.add_argument("--only", nargs="+", choices=[each.__name__ for each in CAMPAIGN])
    options = parser.parse_args()
    torch.set_num_threads(1)
    (FOLDER / "data").mkdir()
    rows = [{"prompt": each.prompt, "chosen": each.responses[0], "rejected": each.responses[-1]} for each in toy.load()[::17]]
    (FOLDER / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stages.preset(FOLDER / "data")
    pristine, began = FOLDER / "pristine", time.monotonic()
    ended = in_child(lambda: chain(pristine))
    seconds, total, bad = time.monotonic() - began, collections.Counter(), 0
    assert ended.result, ended.said
    for trials, number in CAMPAIGN.items():
        if options.only and trials.__name__ not in options.only:
            continue
        counts, rng = collections.Counter(), random.Random(f"{options.seed} {trials.__name__}")
        for what, child, wanted in trials(max(round(number * options.scale), 1), rng, pristine, ended.result, seconds):
            found = verdict(child, wanted)
            counts[found] += 1
            if found != "survived":
                bad += 1
                print(
                    f"{trials.__name__}, {what}: {found}\n    " + "\n    ".join(child.said.strip().splitlines()[-6:]),
                    flush=True,
                )
        print(f"{trials.__name__:7} tried {sum(counts.values())}, survived {counts['survived']}", dict(counts), flush=True)
        total += counts
    wrong = {kind: total[kind] for kind in ("silently wrong", "traceback", "hang")}
    print(
        f"seed {options.seed}: tried {sum(total.values())}, survived {total['survived']}; {wrong}; {time.monotonic() - began:.0f} s"
    )
    shutil.rmtree(FOLDER, ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
