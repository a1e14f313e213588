"""What several stages of `experiments` have in common: training in a folder, the reference's log-probabilities, reward models."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pdpo.data import Preference
from pdpo.distributed import is_leader, on_leader
from pdpo.encoding import chat_template, encode_records
from pdpo.evaluation import last_hidden, sequence_kl, toy_grades
from pdpo.files import read_json, read_sealed, write_json, write_sealed
from pdpo.presets import Preset, TrainConfig
from pdpo.reach import code_version
from pdpo.results import RewardModel, Run
from pdpo.sampling import Sample, sample
from pdpo.training import Row, train, with_reference_logps


def train_in(folder: Path, preset: Preset, policy, tokenizer, rows, config: TrainConfig, *, held_out, measure=None) -> None:
    """Trains the policy, with its checkpoint in the stage's folder, and saves it there."""
    kept = {"checkpoint": folder / "checkpoint.pt", "checkpoint_seconds": preset.checkpoint_seconds}
    history = train(policy, rows, config, held_out=held_out, measure=measure, **kept)
    if is_leader():
        save_in(folder, policy, tokenizer, history)


def save_in(folder: Path, policy, tokenizer, history: list[dict]) -> None:
    head = policy._parameters.pop("reward_head", None)  # the folder stays that of a plain causal language model
    policy._parameters.pop("value_head", None)  # which nothing after the training needs
    policy.save_pretrained(folder / "policy")
    if head is not None:
        write_json(folder / "policy" / "reward_head.json", {"weights": head.tolist()})
    tokenizer.chat_template = chat_template(tokenizer)
    tokenizer.save_pretrained(folder / "policy")
    write_json(folder / "history.json", history)
    for left in folder.glob("*checkpoint.pt*"):  # also one that a killed process was writing
        left.unlink()


def with_cached_reference(sft: Run, policy, rows: list[Row], needed: Sequence[int]) -> list[Row]:
    """`with_reference_logps` of those needed, kept in a file beside the SFT stage: runs of all methods and betas share it."""
    wanted = [rows[i] for i in needed]
    content = [sft.path.name, sft.preset.precision, [row.sequences for row in wanted], code_version(with_reference_logps)]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10]
    path = sft.path.with_name(f"{sft.path.name}-reference-{key}.json")
    if (kept := on_leader(lambda: read_sealed(path))) is None:
        options = {"micro_batch_size": sft.preset.micro_batch_size, "precision": sft.preset.precision}
        done = with_reference_logps(policy, wanted, **options)
        kept = json.dumps([row.reference_logps for row in done]).encode()
        on_leader(lambda: write_sealed(path, kept))
    rows = list(rows)
    for i, values in zip(needed, json.loads(kept), strict=True):
        rows[i] = replace(rows[i], reference_logps=tuple(values))
    return rows


def score_of(models: Sequence[RewardModel], records: list[Preference]) -> Callable[[list[Sample]], torch.Tensor]:
    """Scores of samples, (N,), with mean 0 and standard deviation 1 on the records' responses; the smallest of several models'
    scores, and without any the toy's gold score."""
    scored = [model.scored(records) for model in models] or [records]
    known = [torch.tensor([score for record in each for score in record.scores]) for each in scored]
    raw = [model.scorer() for model in models] or [lambda samples: torch.from_numpy(toy_grades(samples)["score"])]

    def score(samples: list[Sample]) -> torch.Tensor:
        scores = [(of(samples) - on.mean()) / on.std() for of, on in zip(raw, known, strict=True)]
        return torch.stack(scores).min(0).values

    return score


def sampled_kl(policy, reference, tokenizer, records: list[Preference], sft: Run) -> tuple[list[Sample], dict[str, float]]:
    """Samples to the first `num_kl_prompts` of held-out records, and their KL from the reference."""
    preset, prompts = sft.preset, [record.prompt for record in records[: sft.preset.num_kl_prompts]]
    options = {"batch_size": preset.micro_batch_size, "precision": preset.precision}
    length = preset.max_new_tokens
    samples = sample(policy, tokenizer, prompts, temperature=1.0, max_new_tokens=length, seed=sft.seed, **options)
    kl = sequence_kl(policy, reference, samples, **options)
    return samples, {"eval_kl": float(kl.exact.mean()), "eval_token_kl": float(kl.exact.sum() / kl.num_tokens.sum())}


def features_of(policy, tokenizer, records: list[Preference], preset: Preset) -> torch.Tensor:
    """(B, 2, D) the last hidden states that a reward model's head reads."""
    encoded = encode_records(tokenizer, records)
    return last_hidden(policy, encoded, batch_size=preset.micro_batch_size, precision=preset.precision)


def write_reward_model(folder: Path, weights, policy, tokenizer, held_out: list[Preference], preset: Preset) -> None:
    scores = features_of(policy, tokenizer, held_out, preset) @ weights
    probabilities = scores.diff(dim=1).neg().sigmoid().squeeze(1)  # of the true order
    write_json(folder / "reward_model.json", {"weights": weights.tolist(), "held_out": probabilities.tolist()})


def read_reward_model(path: Path, reads: Run, *, num_pairs: int) -> RewardModel:
    stored = read_json(path / "reward_model.json")
    return RewardModel(path, reads, torch.tensor(stored["weights"]), np.array(stored["held_out"]), num_pairs=num_pairs)
