"""What stages give: a training run, an evaluation, a reward model; where each lies, and what it was made with."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from pdpo.data import Preference
from pdpo.device import device
from pdpo.encoding import encode_records
from pdpo.evaluation import response_scores
from pdpo.files import check_new_folder, read_json, replacing, shown
from pdpo.models import load_policy, load_tokenizer
from pdpo.presets import WITH_HEAD, Preset, TrainConfig
from pdpo.stages import check_large_files
from pdpo.statistics import calibration


@dataclass(frozen=True)
class Run:
    """A finished training stage.

    Attributes:
        path: its folder: policy/ (save_pretrained, with the tokenizer; DRDO's reward_head.json), history.json, stage.json.
        preset: sizes, data and machine that it ran with.
        train: its hyperparameters.
        history: one dict an optimizer step; see `training.train`.
        parent: the SFT run that it started from, which is its reference; None for an SFT run.
    """

    path: Path
    preset: Preset
    train: TrainConfig
    history: list[dict] = field(repr=False)
    parent: "Run | None" = field(default=None, repr=False)

    @property
    def method(self) -> str:
        return self.train.method

    @property
    def beta(self) -> float | None:
        return self.train.beta

    @property
    def seed(self) -> int:
        return self.train.seed

    @property
    def sft(self) -> "Run":
        """The SFT run: this one, or the one that it started from."""
        return self.parent or self

    def __repr__(self) -> str:
        beta = "" if self.beta is None else f" beta={self.beta:g}"
        losses = [row["eval_loss"] for row in self.history if "eval_loss" in row] or [float("nan")]
        return (
            f"<Run {self.method}{beta} seed={self.seed}: held-out loss {losses[0]:.3f} -> {losses[-1]:.3f}, {shown(self.path)}>"
        )

    def load_policy(self) -> torch.nn.Module:
        """The trained policy, on this machine's device."""
        check_large_files(self.path)
        return load_policy(replace(self.preset, model=str(self.path / "policy"))).to(device()).eval()

    def load_reward_head(self) -> torch.Tensor:
        """(D,) the weights of the head that DRDO trains beside its policy, whose last hidden state at the EOS it scores."""
        if self.method not in WITH_HEAD:
            raise ValueError(f"{shown(self.path)}: expected a run of drdo, got one of {self.method}, which has no head.")
        return torch.tensor(read_json(self.path / "policy" / "reward_head.json")["weights"])

    def load_tokenizer(self):
        """The tokenizer that it was trained with."""
        return load_tokenizer(replace(self.preset, tokenizer=str(self.path / "policy")))


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation stage of one run: `rows`, one dict a sample, the samples of a prompt side by side.

    Keys: prompt, text, finished, chosen, rejected; on `toy` also score, correct, degenerate and a 0/1 for each tone. The first
    samples of each prompt, those that were looked at more closely, also have win (1, 0.5 or 0) and, at temperature 1, kl, kl_k1,
    kl_k3 (nats a response) and num_tokens.
    """

    path: Path
    run: Run
    rows: list[dict] = field(repr=False)
    num_samples: int

    def column(self, key: str) -> np.ndarray:
        """(num_prompts,) the mean of `key` over each prompt's samples; prompts are the independent units."""
        return self.samples(key).mean(1)

    def samples(self, key: str) -> np.ndarray:
        """(num_prompts, K) the values of `key`: K is num_samples, or the number of those that have this key."""
        if key not in self.rows[0]:
            raise ValueError(f"Evaluation: expected one of {sorted(self.rows[0])}, got {key!r}.")
        values = np.array([row[key] for row in self.rows if key in row], dtype=float)
        return values.reshape(len(self.rows) // self.num_samples, -1)


@dataclass(frozen=True)
class RewardModel:
    """A finished reward-model stage.

    Attributes:
        path: its folder.
        sft: whose last hidden state it reads; DRDO's oracle reads its own.
        weights: (D,) of the linear head.
        held_out: (P,) the probability that it gives to the true order of each pair of the test split.
        num_pairs: it was fitted to.
    """

    path: Path
    sft: Run
    weights: torch.Tensor
    held_out: np.ndarray
    num_pairs: int

    def __str__(self) -> str:
        return (
            f"a reward model fitted to {self.num_pairs} training pairs; it ranks {np.mean(self.held_out > 0.5):.3f} of "
            f"{len(self.held_out)} held-out pairs right, with an expected calibration error of {calibration(self.held_out)[1]:.3f}"
        )

    def scored(self, records: list[Preference]) -> list[Preference]:
        """The records with its scores, in nats: a difference is the log-odds that it gives to that order."""
        encoded, preset = encode_records(self.sft.load_tokenizer(), records), self.sft.preset
        scores = response_scores(
            self.sft.load_policy(), encoded, self.weights, batch_size=preset.micro_batch_size, precision=preset.precision
        )
        return [replace(record, scores=values) for record, values in zip(records, scores, strict=True)]


def run_info(preset: Preset, stages: list) -> dict:
    """What a figure was made with: its preset, data, model and seeds, the machine of each stage, minutes, peak memory.

    Args:
        preset: of the stages.
        stages: Runs and Evaluations that the figure was drawn from.
    """
    records = [read_json(stage.path / "stage.json") for stage in stages]
    environments = [record["environment"] for record in records]
    together = {
        key: sorted({str(each[key]) for each in environments if each.get(key)})
        for key in ("python", "torch", "transformers", "device", "processes", "model_revision")
        if any(each.get(key) for each in environments)
    }
    return {
        "preset": preset.name,
        "precision": preset.precision,
        "data": preset.data,
        "data_sha256": sorted({record["config"]["data"] for record in records}),
        "model": preset.model or "random weights",
        "seeds": sorted({record["config"].get("seed", record["config"].get("train", {}).get("seed")) for record in records}),
        **together,
        "minutes": round(sum(each["minutes"] for each in environments), 2),
        "peak_memory_mb": max(each["peak_memory_mb"] or 0 for each in environments),
        "stages": sorted(stage.path.name for stage in stages),
    }


def copy_run(run: Run, target: Path) -> Path:
    """Copies a run's policy, tokenizer, history and record to `target`, a folder that must not hold anything yet."""
    check_new_folder(target)
    check_large_files(run.path)
    with replacing(target) as temporary:
        shutil.copytree(run.path / "policy", temporary)
        for name in ("history.json", "stage.json"):
            shutil.copy(run.path / name, temporary / name)
    return target
