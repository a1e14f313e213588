"""What stages give: a training run, an evaluation, a reward model; where each lies, and what it was made with."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pdpo.cells import card, curve
from pdpo.data import Preference
from pdpo.device import device
from pdpo.encoding import encode_records
from pdpo.evaluation import response_scores
from pdpo.files import read_json, shown
from pdpo.models import load_policy, load_tokenizer
from pdpo.presets import WITH_HEAD, Preset, TrainConfig
from pdpo.sampling import Sample
from pdpo.stages import check_large_files
from pdpo.statistics import calibration


@dataclass(frozen=True)
class Run:
    """A finished training stage."""

    path: Path  # its folder: policy/ (save_pretrained, with the tokenizer; DRDO's reward_head.json), history.json, stage.json
    preset: Preset  # sizes, data and machine that it ran with
    train: TrainConfig  # its hyperparameters
    history: list[dict] = field(repr=False)  # one dict an optimizer step; see `training.train`
    parent: "Run | None" = field(default=None, repr=False)  # the SFT run that it started from; None for an SFT run

    method = property(lambda self: self.train.method)
    beta = property(lambda self: self.train.beta)
    seed = property(lambda self: self.train.seed)

    @property
    def sft(self) -> "Run":
        """The SFT run: this one, or the one that it started from."""
        return self.parent or self

    @property
    def title(self) -> str:
        """Method, beta and seed."""
        return f"{self.method}{'' if self.beta is None else f' beta={self.beta:g}'} seed={self.seed}"

    @property
    def heading(self) -> str:
        """The method in capitals, and beta."""
        return self.method.upper() + ("" if self.beta is None else f", beta {self.beta:g}")

    def measured(self, key: str) -> tuple[list[int], list[float]]:
        """The optimizer steps after which `key` was measured, and its values."""
        rows = [row for row in self.history if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def __repr__(self) -> str:
        kl = self.measured("eval_kl")[1]
        return f"<Run {self.title}: {self.train.steps} steps{f', KL {kl[-1]:.3g} nats' if kl else ''}>"

    def _repr_html_(self) -> str:
        (steps, losses), (_, kl) = self.measured("eval_loss"), self.measured("eval_kl")
        facts = {"method": self.method, "beta": "none" if self.beta is None else f"{self.beta:g}", "seed": f"{self.seed}"}
        facts["steps"] = f"{self.train.steps}"
        for name, key in (("training loss", "loss"), ("held-out loss", "eval_loss")):
            values = self.measured(key)[1]
            facts |= {name: f"{values[0]:.3f} to {values[-1]:.3f}"} if values else {}
        facts |= {"KL from the reference": f"{kl[-1]:.3g} nats a response"} if kl else {}
        facts |= {"minutes": f"{minutes(self.path):.2g}", "kept in": shown(self.path)}
        return card(self.title, facts, curve(steps, losses, label="held-out loss"))

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
    kl_k3 (nats a response) and num_tokens."""

    path: Path
    run: Run
    rows: list[dict] = field(repr=False)
    num_samples: int

    @property
    def means(self) -> dict[str, float]:
        """Of what stands in each sample's row as a number: win, kl, and on `toy` score, correct, degenerate."""
        keys = ("win", "kl", "score", "correct", "degenerate")
        return {key: float(self.column(key).mean()) for key in keys if key in self.rows[0]}

    def __repr__(self) -> str:
        means = ", ".join(f"{key} {value:.3g}" for key, value in self.means.items())
        size = f"{len(self.rows) // self.num_samples} prompts x {self.num_samples} samples"
        return f"<Evaluation of {self.run.title}: {size}: {means}>"

    def _repr_html_(self) -> str:
        size = {"prompts": f"{len(self.rows) // self.num_samples}", "samples of each": f"{self.num_samples}"}
        size |= {key: f"{value:.3g}" for key, value in self.means.items()}
        size |= {"minutes": f"{minutes(self.path):.2g}", "kept in": shown(self.path)}
        return card(f"evaluation of {self.run.title}", size)

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
    """A finished reward-model stage."""

    path: Path  # its folder
    sft: Run  # whose last hidden state it reads; DRDO's oracle reads its own
    weights: torch.Tensor  # (D,) of the linear head
    held_out: np.ndarray  # (P,) the probability that it gives to the true order of each pair of the test split
    num_pairs: int  # it was fitted to

    def __repr__(self) -> str:
        return f"<RewardModel of {self.num_pairs} pairs on {self.sft.title}: ranks {self._right} right>"

    def _repr_html_(self) -> str:
        facts = {"fitted to": f"{self.num_pairs} training pairs", "ranks right": self._right}
        facts |= {"expected calibration error": f"{calibration(self.held_out)[1]:.3f}", "kept in": shown(self.path)}
        return card(f"reward model on {self.sft.title}", facts)

    def __str__(self) -> str:
        error = f"an expected calibration error of {calibration(self.held_out)[1]:.3f}"
        return f"a reward model fitted to {self.num_pairs} training pairs; it ranks {self._right} right, with {error}"

    @property
    def _right(self) -> str:
        return f"{np.mean(self.held_out > 0.5):.3f} of {len(self.held_out)} held-out pairs"

    def scorer(self) -> Callable[[list[Sample]], torch.Tensor]:
        """A function of samples that gives their scores, (N,) in nats, by a network that is loaded once."""
        scores = self._scores()
        return lambda samples: torch.tensor(scores([[each.encoded] for each in samples]))[:, 0]

    def scored(self, records: list[Preference]) -> list[Preference]:
        """The records with its scores, in nats: a difference is the log-odds that it gives to that order."""
        scores = self._scores()(encode_records(self.sft.load_tokenizer(), records))
        return [replace(record, scores=values) for record, values in zip(records, scores, strict=True)]

    def _scores(self) -> Callable:
        policy, preset = self.sft.load_policy(), self.sft.preset
        options = {"weights": self.weights, "batch_size": preset.micro_batch_size, "precision": preset.precision}
        return partial(response_scores, policy, **options)


def minutes(path: Path) -> float:
    """What a stage took, as its record says; nan where it has none."""
    return read_json(path / "stage.json")["environment"]["minutes"] if (path / "stage.json").is_file() else float("nan")


def run_info(preset: Preset, stages: list) -> dict:
    """What a figure was made with: its preset, data, model and seeds, the machine of each stage, minutes, peak memory.

    stages: Runs and Evaluations that the figure was drawn from."""
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
