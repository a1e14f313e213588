"""Seconds and peak memory of one DPO step: TRL's DPOTrainer, pdpo's plain path, pdpo's fast path.

    python -m venv bench && bench/bin/pip install torch==2.13.0 trl==1.16.0 && bench/bin/pip install -e .
    bench/bin/python benchmarks/preference_step.py                 # two shapes, two templates: 40 minutes on 2 cores
    bench/bin/python benchmarks/preference_step.py --shapes small --templates pdpo --rounds 1

Every variant trains the same random weights in the real architecture on the same batches of the `instructions` data, with
the same AdamW and learning rate. In each round every variant runs once, in a process of its own, so that peaks of memory
are its own and a busy minute of the machine hits all alike; the first step of a process is not timed. The losses of every
step must agree with the plain path's. A time is the median over rounds of the mean over steps, a ratio the median over
rounds of that round's ratio. `--cpu-time --threads 1` counts processor seconds instead of the clock's: for a machine that
others are using, too.

What the fast path saves is what a batch repeats, so the prompt template matters: "pdpo" is this kit's own, of 7 tokens;
"alpaca" is that of Stanford Alpaca (Taori 2023), of 30 tokens, with which this data set is mostly used elsewhere.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {"small": (768, 12, 12), "medium": (1024, 24, 16), "test": (64, 2, 2)}  # width, layers, heads
VARIANTS = {
    "TRL as shipped (bf16 autocast, checkpointing)": {"trl": {}},
    "TRL float32": {"trl": {"bf16": False}},
    "TRL float32, precomputed reference, no checkpointing": {
        "trl": {"bf16": False, "precompute_ref_log_probs": True, "gradient_checkpointing": False}
    },
    "pdpo plain (policy_logps)": {"pdpo": "policy_logps"},
    "pdpo fast (shared_policy_logps)": {"pdpo": "shared_policy_logps"},
}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
TEMPLATES = {"alpaca": ALPACA, "pdpo": None}
BETA, LR, BETAS = 0.1, 1e-4, (0.9, 0.99)
LOSS_TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "medium"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps in a round")
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds in place of elapsed ones")
    parser.add_argument("--templates", nargs="+", choices=TEMPLATES, default=list(TEMPLATES))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(**json.loads(arguments.worker))))
        return
    for template in arguments.templates:
        for shape in arguments.shapes:
            compare(shape, template, arguments)


def compare(shape: str, template: str, arguments) -> None:
    with tempfile.TemporaryDirectory() as folder:
        task = {"folder": folder, "steps": arguments.steps + 1, "pairs": arguments.pairs, "threads": arguments.threads}
        task |= {"template": TEMPLATES[template], "cpu_time": arguments.cpu_time}
        run(task | {"job": "prepare", "shape": shape})
        results: dict[str, list[dict]] = {name: [] for name in VARIANTS}
        rates = []
        for number in range(1, arguments.rounds + 1):
            rates.append(run(task | {"job": "matrix_rate"})["flops"])
            for name in VARIANTS:
                print(
                    f"{shape}, template {template}, round {number} of {arguments.rounds}: {name}", file=sys.stderr, flush=True
                )
                results[name].append(run(task | {"job": "variant", "name": name}))
    seconds = {name: statistics.median(statistics.mean(each["seconds"][1:]) for each in runs) for name, runs in results.items()}
    expected = results["pdpo plain (policy_logps)"][0]["losses"]
    rate = statistics.median(rates)
    device = results["pdpo plain (policy_logps)"][0]["device"]
    kind = "processor" if arguments.cpu_time else "elapsed"
    print(f"\nGPT-2-{shape} shape, template {template}, batches of {arguments.pairs} pairs,")
    print(f"{device}, {arguments.threads} threads, {kind} seconds,")
    print(f"{arguments.rounds} rounds of {arguments.steps} steps; matrix product {rate / 1e9:.0f} GFLOP/s")
    tokens = results["pdpo fast (shared_policy_logps)"][0]["tokens"]
    print(f"tokens a batch: {tokens['padded']:.0f} padded, {tokens['real']:.0f} real, {tokens['tree']:.0f} in the tree\n")
    names = list(VARIANTS)
    print("| variant | s/step | spread | vs TRL float32 | vs TRL tuned | peak GiB | of matrix rate | largest loss difference |")
    print("|---|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        times = [statistics.mean(each["seconds"][1:]) for each in runs]
        ratios = []
        for base in (names[1], names[2]):
            theirs = [statistics.mean(each["seconds"][1:]) for each in results[base]]
            ratios.append(statistics.median(other / mine for other, mine in zip(theirs, times, strict=True)))
        used = f"{runs[0]['flops'] / seconds[name] / rate:.2f}" if "flops" in runs[0] else ""
        difference = max(abs(a - b) for each in runs for a, b in zip(each["losses"], expected, strict=True))
        print(f"| {name} | {seconds[name]:.3g} | {min(times):.3g}-{max(times):.3g} | {ratios[0]:.2f} | {ratios[1]:.2f} "
              f"| {max(each['peak_gib'] for each in runs):.1f} | {used} | {difference:.1e} |")  # fmt: skip
        tolerance = LOSS_TOLERANCE["bfloat16" if name == names[0] else "float32"]
        if difference > tolerance:
            sys.exit(f"{name}: losses {[each['losses'] for each in runs]}, expected {expected}: not the same computation.")
    print(f"losses of the plain path: {', '.join(f'{each:.5f}' for each in expected)}", flush=True)


def run(task: dict) -> dict:
    """A job in a process of its own, whose last line of output is its result."""
    environment = os.environ | {"OMP_NUM_THREADS": str(task["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode != 0:
        sys.exit(f"{task}:\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


def work(job: str, threads: int, **task) -> dict:
    import torch

    torch.set_num_threads(threads)
    if job == "prepare":
        return prepare(task["folder"], task["shape"])
    clock = time.process_time if task["cpu_time"] else time.perf_counter
    if job == "matrix_rate":
        return {"flops": matrix_rate(clock)}
    if task["template"]:
        from pdpo import encoding

        encoding.TEMPLATE = task["template"]
    (kind, setting), = VARIANTS[task["name"]].items()  # fmt: skip
    return (time_trl if kind == "trl" else time_pdpo)(setting, clock, task["folder"], task["steps"], task["pairs"])


def prepare(folder: str, shape: str, **more) -> dict:
    """Random weights in GPT-2's architecture, with GPT-2's vocabulary or what more of its config says, in a local folder."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    width, layers, heads = SHAPES[shape]
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads, **more)).save_pretrained(folder)
    return {}


def matrix_rate(clock) -> float:
    """FLOP/s of a square float32 product, the best of ten."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, best = torch.randn(2048, 2048, device=device), 0.0
    for _ in range(10):
        began = clock()
        float((a @ a)[0, 0])
        best = max(best, 2 * 2048**3 / (clock() - began))
    return best


def batches(steps: int, pairs: int) -> list[list]:
    """The same records for every variant: those that `train` would take in its first steps with seed 0."""
    from pdpo.data import load_split
    from pdpo.training import batch_indices

    records = load_split("instructions")[0]
    return [[records[i] for i in batch_indices(len(records), pairs, seed=0, step=step)] for step in range(steps)]


def tokenizer_of(folder: str):
    from dataclasses import replace

    from pdpo.models import load_tokenizer
    from pdpo.presets import get_preset

    vocabulary = os.environ.get(
        "PDPO_GPT2_TOKENIZER", str(Path(__file__).resolve().parents[2] / "shared/models/gpt2-tokenizer")
    )
    return load_tokenizer(replace(get_preset("small"), tokenizer=vocabulary, context=1024))


def reset_peak() -> None:
    """Forgets the peak that loading left, where Linux allows it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_gib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_pdpo(path: str, clock, folder: str, steps: int, pairs: int) -> dict:
    from dataclasses import replace

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pdpo import training, trees
    from pdpo.device import device
    from pdpo.models import load_policy
    from pdpo.presets import TrainConfig, get_preset

    policy = load_policy(replace(get_preset("small"), model=folder)).to(device())
    tokenizer, data = tokenizer_of(folder), batches(steps, pairs)
    logps_of, sequences = getattr(training, path), 2 * pairs
    config = TrainConfig("dpo", steps, pairs, LR, beta=BETA, micro_batch_size=sequences)
    rows = [
        training.with_reference_logps(policy, training.preference_rows(tokenizer, records, config), micro_batch_size=sequences)
        for records in data
    ]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    reset_peak()
    seconds, losses = [], []
    for batch in rows:
        began = clock()
        losses.append(training.train_step(policy, optimizer, batch, config, logps_of=logps_of)["loss"])
        seconds.append(clock() - began)
    peak = peak_gib()
    with FlopCounterMode(display=False) as counter:
        for batch in rows[1:]:
            policy.zero_grad()
            training.row_losses(policy, batch, config, logps_of=logps_of)[0].mean().backward()
    lengths = [[len(each.input_ids) for row in batch for each in row.sequences] for batch in rows]
    tree = [trees.build_tree(sorted(each for row in batch for each in row.sequences)) for batch in rows]
    tokens = {
        "padded": statistics.mean(len(each) * max(each) for each in lengths),
        "real": statistics.mean(map(sum, lengths)),
        "tree": statistics.mean(each.input_ids.numel() for each in tree),
    }
    return {
        "seconds": seconds, "losses": losses, "peak_gib": peak, "tokens": tokens, "device": device().type,
        "flops": counter.get_total_flops() / (steps - 1),
    }  # fmt: skip


def time_trl(setting: dict, clock, folder: str, steps: int, pairs: int) -> dict:
    records = [record for batch in batches(steps, pairs) for record in batch]
    return trl_steps(setting, clock, folder, records, tokenizer_of(folder), pairs)


def trl_steps(setting: dict, clock, folder: str, records: list, tokenizer, pairs: int) -> dict:
    """One step of TRL's trainer for every `pairs` records, in their order, in this process and under `encoding.TEMPLATE`."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from pdpo.encoding import TEMPLATE

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds, self.losses = [], []

        def on_step_begin(self, *arguments, **more):
            self.began = clock()

        def on_step_end(self, *arguments, **more):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(clock() - self.began)

        def on_log(self, args, state, control, logs=None, **more):
            if "loss" in logs:
                self.losses.append(logs["loss"])

        def on_train_begin(self, *arguments, **more):
            reset_peak()

    rows = [{"prompt": TEMPLATE.format(prompt=r.prompt), "chosen": r.chosen, "rejected": r.rejected} for r in records]
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), report_to=[], save_strategy="no", logging_steps=1, max_steps=len(records) // pairs, beta=BETA,
        per_device_train_batch_size=pairs, learning_rate=LR, lr_scheduler_type="constant", adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], weight_decay=0.0, max_grad_norm=1.0, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        **setting,
    )  # fmt: skip
    policy, times = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), Clock()
    trainer = DPOTrainer(
        policy,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    trainer.train()
    return {"seconds": times.seconds, "losses": times.losses, "peak_gib": peak_gib()}


if __name__ == "__main__":
    main()
