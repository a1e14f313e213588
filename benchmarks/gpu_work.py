"""What the parts of `gpu.py` share: the package, the task that each is given, measuring, and what is made up where it is not given."""

# ruff: noqa: E402, F401 (the environment is set before torch is imported; the parts import the package's names from here)

import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not wake it: forked parts could not use it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from preference_step import ALPACA, BETAS, LR
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

# The package: every name of it that the parts use comes in here.
import pdpo.__main__ as command_line
from pdpo import encoding
from pdpo.checkpoint import fitting_micro_batch
from pdpo.data import load_preferences
from pdpo.device import autocast, device
from pdpo.distributed import claim_gpu
from pdpo.encoding import Encoded, encode_records
from pdpo.losses import dpo_loss
from pdpo.models import load_policy, load_tokenizer, with_float32_head, with_fused_gelu
from pdpo.presets import PRESETS, TrainConfig, get_preset
from pdpo.sampling import sample
from pdpo.training import Row, policy_logps, shared_policy_logps, train, train_step, with_reference_logps
from pdpo.trees import build_tree

PRESET = "gpt2-medium"
PATHS = {"plain": policy_logps, "fast": shared_policy_logps}
TEMPLATES = {"pdpo": encoding.TEMPLATE, "alpaca": ALPACA}
PRECISIONS = ("bfloat16", "float16", "float32")  # what is wanted most comes first
# (prompt, what the responses share, chosen, rejected) in GPT-2's tokens: every 55th of the 1,100 rows of `instructions`, by length
LENGTHS = [
    (12, 0, 1, 2), (7, 5, 7, 8), (7, 4, 8, 11), (15, 4, 6, 7), (13, 0, 7, 13), (18, 1, 10, 6), (10, 0, 14, 12), (18, 0, 12, 8),
    (10, 0, 12, 17), (16, 4, 9, 11), (8, 0, 22, 12), (21, 0, 20, 2), (10, 6, 11, 18), (15, 0, 21, 10), (11, 8, 18, 12),
    (15, 0, 24, 13), (20, 8, 12, 15), (15, 0, 18, 26), (8, 0, 41, 18), (8, 0, 42, 30),
]  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What every part is given."""

    folder: Path  # model/, data.json, and NAME.jsonl, the rows of each part
    dry: bool
    start_method: str = "fork"
    data_dir: str | None = None
    tokenizer_dir: str | None = None

    def either(self, full, dry):
        return dry if self.dry else full

    def rows(self, part: str) -> list[dict]:
        """The rows that a part has left so far."""
        path = self.folder / f"{part}.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what a killed part was writing has no end of line
        return [json.loads(line) for line in lines]

    @property
    def preset(self):
        """gpt2-medium with the local model and data; in a dry run with less to sample."""
        model, data = str(self.folder / "model"), str(self.folder / "data.json")
        small = {"max_new_tokens": 4, "num_kl_prompts": 2} if self.dry else {}
        return replace(get_preset(PRESET), model=model, tokenizer=model, data=data, **small)


# ---- what parts share


def on_cuda() -> bool:
    return device().type == "cuda"


def clock() -> float:
    """Seconds, once the device has done all that it was given."""
    if on_cuda():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if on_cuda() else None


def reset_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():  # a part that only starts others must not wake the GPU: they are forked
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(key: dict, function: Callable[..., dict], *arguments, **named) -> dict:
    """One row: key, and what function(*arguments, **named) measures; where that fails, why, and the part goes on."""
    reset_memory()
    try:
        return key | function(*arguments, **named)
    except Exception as error:
        return key | {"failed": brief(error)}


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]


def loaded(work: Work):
    """(policy on the device, tokenizer)."""
    return load_policy(work.preset).to(device()), load_tokenizer(work.preset)


def batches_of(work: Work, pairs: int) -> list[list]:
    """The records of some steps: the same ones for every variant."""
    records = load_preferences(work.preset.data)
    return [random.Random(step).choices(records, k=pairs) for step in range(work.either(3, 1))]


def pair_rows(tokenizer, records) -> list[Row]:
    return [Row(tuple(each)) for each in encode_records(tokenizer, records)]


def timed_steps(policy, batches: list[list[Row]], config: TrainConfig, path: str, *, passes: int) -> dict:
    """Seconds a step (the median pass over the batches, after one that is not timed), peak memory, FLOPs and loss."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device().type, enabled=config.precision == "float16")

    def one_pass() -> list[dict]:
        return [train_step(policy, optimizer, rows, config, logps_of=PATHS[path], scaler=scaler) for rows in batches]

    losses, seconds = [record["loss"] for record in one_pass()], []
    for _ in range(passes):
        began = clock()
        one_pass()
        seconds.append((clock() - began) / len(batches))
    measured = {"s/step": statistics.median(seconds), "GiB": peak_gib(), "losses": losses}
    with FlopCounterMode(display=False) as counter:
        one_pass()
    of_modules = counter.get_flop_counts()
    head = sum(sum(operations.values()) for name, operations in of_modules.items() if name.endswith("lm_head"))
    return measured | {"FLOP": counter.get_total_flops() / len(batches), "of them head": head / len(batches)}


# ---- what is made up where it is not given


def made_up(num_words: int) -> tuple[PreTrainedTokenizerFast, list[dict]]:
    """A vocabulary of num_words tokens, of which w17 is one, and 1,100 rows of them in the lengths of `instructions`."""
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, num_words - 1)} | {"<|endoftext|>": num_words - 1}
    tokenizer, draw = Tokenizer(models.WordLevel(words, unk_token="<unk>")), random.Random(0)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    def text(num: int) -> str:
        return " ".join(f"w{draw.randrange(1, num_words - 1)}" for _ in range(num))

    rows = []
    for prompt, shared, *responses in LENGTHS * 55:
        begins = text(shared)
        chosen, rejected = (f"{begins} {text(length - shared)}" for length in responses)
        rows.append({"prompt": text(prompt), "chosen": chosen, "rejected": rejected})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"), rows


class HashOfWords:
    """Stands in for SentenceTransformer where it, or its weights, are missing: each word adds one to a place of the vector."""

    def __init__(self, *arguments, **named):
        pass

    def encode(self, texts: list[str], **named):
        vectors = torch.full((len(texts), 64), 1e-3)
        for vector, text in zip(vectors, texts, strict=True):
            for word in text.split():
                vector[hashlib.sha256(word.encode()).digest()[0] % 64] += 1
        return torch.nn.functional.normalize(vectors).numpy()


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """||a - b|| / ||b|| of two gradients."""
    parts = [((x.float() - y.float()).square().sum(), y.float().square().sum()) for x, y in zip(a, b, strict=True)]
    return float(sum(part[0] for part in parts) / sum(part[1] for part in parts)) ** 0.5


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip() or "unknown"
    except OSError:
        return "none"
