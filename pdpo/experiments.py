"""The experiments that notebooks call: each is a named stage, trained or measured once; a second call returns at once."""

import hashlib
import itertools
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers

from pdpo.checkpoint import write_json
from pdpo.data import Preference, fingerprint, load_split, pairs
from pdpo.distributed import is_leader, on_leader, world_size
from pdpo.encoding import encode_records
from pdpo.evaluation import by_prompt, sequence_kl, toy_grades, win_values
from pdpo.models import load_judge, load_policy, load_tokenizer, model_revision
from pdpo.presets import Preset, device, get_preset
from pdpo.reward import calibration, fit_reward_head, last_hidden, response_scores
from pdpo.sampling import sample
from pdpo.stages import check_new_folder, run_all, run_stage, runs_dir, shown
from pdpo.training import Row, TrainConfig, preference_rows, train, with_reference_logps

TRAINING_CODE = ("preferences", "logps", "losses", "encoding", "models", "trees", "distributed", "training")
MEASURING_CODE = ("sampling", "evaluation")  # the KL in a preference run's history
REWARD_CODE = ("encoding", "losses", "models", "reward")
EVALUATION_CODE = ("encoding", "sampling", "evaluation", "toy")


@dataclass(frozen=True)
class Run:
    """A finished training stage.

    Attributes:
        path: its folder: policy/ (save_pretrained, with the tokenizer), history.json, stage.json.
        preset: what it ran with.
        config: everything that determined it.
        history: one dict an optimizer step; see `training.train`.
    """

    path: Path
    preset: Preset
    config: dict
    history: list[dict]

    @property
    def method(self) -> str:
        return self.config["train"]["method"]

    @property
    def beta(self) -> float | None:
        return self.config["train"]["beta"]

    @property
    def seed(self) -> int:
        return self.config["train"]["seed"]

    def load_policy(self) -> torch.nn.Module:
        """The trained policy, on this machine's device."""
        return load_policy(replace(self.preset, model=str(self.path / "policy"))).to(device()).eval()

    def load_tokenizer(self):
        """The tokenizer that it was trained with."""
        return load_tokenizer(replace(self.preset, tokenizer=str(self.path / "policy")))


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation stage: `rows`, one dict a sample, the samples of a prompt side by side.

    Keys: prompt, text, finished, chosen, rejected, win (1, 0.5 or 0); on `toy` also score, correct, degenerate and a 0/1
    for each tone; at temperature 1 also kl, kl_k1, kl_k3 (nats a response) and num_tokens.
    """

    path: Path
    rows: list[dict]
    num_samples: int

    def column(self, key: str) -> np.ndarray:
        """(num_prompts,) the mean of `key` over each prompt's samples; prompts are the independent units."""
        if key not in self.rows[0]:
            raise ValueError(f"Evaluation.column: expected one of {sorted(self.rows[0])}, got {key!r}.")
        return by_prompt([row[key] for row in self.rows], self.num_samples)


@dataclass(frozen=True)
class RewardModel:
    """A finished reward-model stage.

    Attributes:
        path: its folder.
        sft: whose last hidden state it reads.
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


@dataclass(frozen=True)
class Frontier:
    """One method measured at several betas. S seeds, B betas, N test prompts.

    betas: B numbers.
    kl: (S, B, N) nats a response, each a mean over the prompt's samples.
    score: (S, B, N) gold score on `toy`, else the SBERT win.
    stages: the evaluations it was read from, for `experiments.run_info`.
    """

    betas: tuple[float, ...]
    kl: np.ndarray
    score: np.ndarray
    stages: tuple = ()

    def points(self, seeds=slice(None), prompts=slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(B,) KL and (B,) score, means over seeds and prompts, or over a resample of them."""
        return tuple(values[seeds][:, :, prompts].mean((0, 2)) for values in (self.kl, self.score))


def start(preset: str | Preset | None = None) -> Preset:
    """Chooses the preset, says what it runs on and where results go, and pins one thread where bits are compared.

    Args:
        preset: a preset or its name; None is $PDPO_PRESET, else the one that fits the machine.
    """
    chosen = get_preset(preset)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if device().type == "cpu":
        torch.set_num_threads(1)  # the same seed then gives the same bits in every process
    processes = f"{world_size()} processes, " if world_size() > 1 else ""
    hardware = torch.cuda.get_device_name() if device().type == "cuda" else f"CPU, 1 of {os.cpu_count()} cores"
    print(
        f"preset {chosen.name}: {processes}{hardware}, {chosen.precision}, data {chosen.data}, results in {shown(runs_dir() / chosen.name)}"
    )
    return chosen


def run_sft(preset: Preset | str, *, seed: int = 0, wait: bool = True) -> Run:
    """Supervised fine-tuning on the training split's responses.

    Args:
        preset: sizes, data, steps.
        seed: of random weights and of the order of the rows.
        wait: False raises Busy where another process is at it.
    """
    preset = get_preset(preset)
    train_records, validation, _ = load_split(preset.data)
    config = TrainConfig(
        "sft", preset.sft_steps, preset.sft_batch_size, preset.sft_lr,
        micro_batch_size=preset.micro_batch_size, precision=preset.precision, seed=seed,
    )  # fmt: skip
    source = {
        "preset": {key: getattr(preset, key) for key in ("vocab_size", "embedding", "layers", "heads", "context")},
        "model": _files(preset.model),
        "tokenizer": _files(preset.tokenizer),
        "all_responses": preset.sft_all_responses,
    }

    def build(folder: Path) -> dict:
        tokenizer = load_tokenizer(preset, train_records)
        policy = load_policy(preset, tokenizer=tokenizer, seed=seed).to(device())
        rows, held_out = (
            [
                Row((each,))
                for encoded in encode_records(tokenizer, records)
                for each in (encoded if preset.sft_all_responses else encoded[:1])
            ]
            for records in (train_records, validation)
        )
        _train(folder, preset, policy, tokenizer, rows, config, held_out=held_out)
        return {"model": preset.model, "model_revision": model_revision(preset.model)}  # which nothing pins

    determinants = {
        "train": asdict(config),
        **source,
        "num_evaluations": preset.num_evaluations,
        "data": fingerprint(train_records + validation),
    }
    stage = run_stage(preset.name, f"sft-seed{seed}", determinants, TRAINING_CODE, build, wait=wait, together=True)
    return _load_run(preset, *stage)


def run_preference(
    preset: Preset | str,
    *,
    method: str,
    beta: float,
    seed: int = 0,
    alpha: float | None = None,
    offset_scale: str | None = None,
    records: list[Preference] | None = None,
    num_evaluations: int | None = None,
    wait: bool = True,
    **options,
) -> Run:
    """Preference training, afresh from the SFT stage of the same seed.

    Args:
        preset: sizes, data, steps.
        method: "dpo", "odpo", "slic" or "plackett_luce".
        beta: KL strength; a larger beta keeps the policy closer to the reference.
        seed: of the SFT stage, of which pairs are drawn and of their order.
        alpha, offset_scale: ODPO's, see `score_offset`; None is the preset's. Where the data has no scores, those of
            `run_reward_model` take their place.
            Scale "mean" is a control: every pair has the mean of the "log" offsets, whatever its own scores.
        num_evaluations: held-out measurements along the run; None is the preset's number. They take a third of its time.
        records: what to train on: pairs, or rankings for "plackett_luce"; None makes them from the training split.
        wait: False raises Busy where another process is at it or at its SFT stage.
        options: more fields of `TrainConfig`, such as label_smoothing, or others than the preset's.
    """
    preset = get_preset(preset)
    config = TrainConfig(**{
        "method": method, "steps": preset.preference_steps, "batch_size": preset.preference_batch_size,
        "lr": preset.preference_lr, "beta": beta, "micro_batch_size": preset.micro_batch_size,
        "precision": preset.precision, "seed": seed, **options,
    })  # fmt: skip
    sft = run_sft(preset, seed=seed, wait=wait)
    train_records, validation, _ = load_split(preset.data)
    held_out_records = validation if method == "plackett_luce" else pairs(validation)
    if records is None:
        ranked = method == "plackett_luce"
        records = train_records if ranked else pairs(train_records, num_per_prompt=preset.pairs_per_prompt, seed=seed)
    offset = {"alpha": preset.alpha if alpha is None else alpha, "scale": offset_scale or preset.offset_scale}
    unscored = method == "odpo" and not any(record.scores for record in records)
    if unscored and offset["scale"] == "log_ratio":
        raise ValueError(
            "run_preference: expected offset_scale 'log', 'identity' or 'mean' for data without scores, got 'log_ratio'. It "
            "needs scores > 0, and those of a reward model lie around 0."
        )
    reward_model = run_reward_model(preset, seed=seed, wait=wait) if unscored else None
    preset = replace(preset, num_evaluations=num_evaluations or preset.num_evaluations)

    def build(folder: Path) -> None:
        scored, scored_held_out = records, held_out_records
        if reward_model:
            print(f"odpo: this data has no scores; offsets are made from those of {reward_model}")
            scored, scored_held_out = reward_model.scored(records), reward_model.scored(held_out_records)
        tokenizer, policy = sft.load_tokenizer(), sft.load_policy()  # which at this moment is the reference, too
        prompts = [record.prompt for record in validation][: preset.num_kl_prompts]
        rows, held_out = (
            _with_cached_reference(sft, policy, preference_rows(tokenizer, each, method=method, **offset))
            for each in (scored, scored_held_out)
        )

        def measure(policy) -> dict:
            samples = sample(
                policy, tokenizer, prompts, temperature=1.0, max_new_tokens=preset.max_new_tokens, seed=seed,
                batch_size=preset.micro_batch_size, precision=preset.precision,
            )  # fmt: skip
            # read from disk each time (tiny: 0.03 s), where it takes the room of the gradients, instead of kept in memory
            reference = sft.load_policy()
            kl = sequence_kl(policy, reference, samples, batch_size=preset.micro_batch_size, precision=preset.precision)
            return {"eval_kl": float(kl.exact.mean()), "eval_token_kl": float(kl.exact.sum() / kl.num_tokens.sum())}

        _train(folder, preset, policy, tokenizer, rows, config, held_out=held_out, measure=measure)

    determinants = {
        "train": asdict(config),
        "offset": offset if method == "odpo" else None,
        "reward_model": reward_model and reward_model.path.name,
        "sft": sft.path.name,
        "data": fingerprint(records + held_out_records),
        "num_evaluations": preset.num_evaluations,
        "num_kl_prompts": preset.num_kl_prompts,
        "max_new_tokens": preset.max_new_tokens,
    }
    name, code = f"{method}-beta{beta:g}-seed{seed}", TRAINING_CODE + MEASURING_CODE + (("reward",) if reward_model else ())
    return _load_run(preset, *run_stage(preset.name, name, determinants, code, build, wait=wait, together=True))


def run_reward_model(preset: Preset | str, *, seed: int = 0, wait: bool = True) -> RewardModel:
    """A linear reward model on the SFT policy, fitted to the training split's pairs and tried on the test split's.

    It sees which response is better, never the data's scores. `run_preference` takes its scores for ODPO where the data
    has none.

    Args:
        preset: data, and the SFT stage that gives the features.
        seed: of the SFT stage and of which pairs are drawn.
        wait: False raises Busy where another process is at it or at its SFT stage.
    """
    preset = get_preset(preset)
    sft = run_sft(preset, seed=seed, wait=wait)
    train_records, _, test = load_split(preset.data)
    drawn, held_out = pairs(train_records, num_per_prompt=preset.pairs_per_prompt, seed=seed), pairs(test)

    def build(folder: Path) -> None:
        policy, tokenizer = sft.load_policy(), sft.load_tokenizer()
        features, held_out_features = (
            last_hidden(policy, encode_records(tokenizer, each), batch_size=preset.micro_batch_size, precision=preset.precision)
            for each in (drawn, held_out)
        )  # (B, 2, D)
        weights = fit_reward_head(features)
        probabilities = (held_out_features @ weights).diff(dim=1).neg().sigmoid().squeeze(1)  # of the true order
        write_json(folder / "reward_model.json", {"weights": weights.tolist(), "held_out": probabilities.tolist()})

    determinants = {"sft": sft.path.name, "data": fingerprint(drawn + held_out)}
    path, _ = run_stage(preset.name, f"reward_model-seed{seed}", determinants, REWARD_CODE, build, wait=wait)
    stored = json.loads((path / "reward_model.json").read_text(encoding="utf-8"))
    return RewardModel(path, sft, torch.tensor(stored["weights"]), np.array(stored["held_out"]), num_pairs=len(drawn))


def run_win_rate(
    preset: Preset | str,
    *,
    method: str,
    beta: float | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    wait: bool = True,
    **options,
) -> Evaluation:
    """Samples of one policy on the test prompts, judged by SBERT and, on `toy`, graded against the truth.

    Args:
        preset: test prompts, samples a prompt (one at temperature 0), judge.
        method: "sft" or a method of `run_preference`, which trains it where it is missing.
        beta: of that run; None for "sft".
        seed: of that run; also of the sampling.
        temperature: of the sampling, >= 0.
        wait: False raises Busy where another process is at it.
        options: more arguments of `run_preference`.
    Raises:
        ValueError: a beta or an option for "sft", which has none.
    """
    if method == "sft" and (beta is not None or options):
        raise ValueError(
            f"run_win_rate: expected no beta and no options for sft, got beta {beta} and {options}. Leave them out."
        )
    preset = get_preset(preset)
    sft = run_sft(preset, seed=seed, wait=wait)
    run = sft if method == "sft" else run_preference(preset, method=method, beta=beta, seed=seed, wait=wait, **options)
    test = load_split(preset.data)[2]
    num_samples = preset.num_samples if temperature > 0 else 1

    def build(folder: Path) -> None:
        policy, tokenizer = run.load_policy(), run.load_tokenizer()
        prompts = [record.prompt for record in test]
        samples = sample(
            policy, tokenizer, prompts, temperature=temperature, max_new_tokens=preset.max_new_tokens, seed=seed,
            num_samples=num_samples, precision=preset.precision,
        )  # fmt: skip
        repeated = [record for record in test for _ in range(num_samples)]
        chosen, rejected = [record.responses[0] for record in repeated], [record.responses[-1] for record in repeated]
        judge = load_judge(preset, cache_dir=runs_dir() / "judge")
        columns = {"win": win_values(judge, [each.text for each in samples], chosen, rejected)}
        if preset.data == "toy":
            columns |= toy_grades(samples)
        if temperature == 1:
            kl = sequence_kl(policy, sft.load_policy(), samples, batch_size=preset.micro_batch_size, precision=preset.precision)
            columns |= {"kl": kl.exact, "kl_k1": kl.k1, "kl_k3": kl.k3, "num_tokens": kl.num_tokens}
        rows = [
            {"prompt": each.prompt, "text": each.text, "finished": each.finished, "chosen": chosen[i], "rejected": rejected[i]}
            | {key: float(values[i]) for key, values in columns.items()}
            for i, each in enumerate(samples)
        ]
        write_json(folder / "rows.json", rows)

    determinants = {
        "run": run.path.name,
        "sft": sft.path.name,
        "temperature": temperature,
        "seed": seed,
        "num_samples": num_samples,
        "max_new_tokens": preset.max_new_tokens,
        "judge": preset.judge,
        "data": fingerprint(test),
    }
    name = f"win_rate-{run.path.name.rsplit('-', 1)[0]}-temperature{temperature:g}"
    path, _ = run_stage(preset.name, name, determinants, EVALUATION_CODE, build, wait=wait)
    return Evaluation(path, json.loads((path / "rows.json").read_text(encoding="utf-8")), num_samples)


def run_frontier(
    preset: Preset | str, *, betas: tuple[float, ...] | None = None, records: dict | None = None, **options
) -> Frontier:
    """Trains and measures one method at every beta and seed of the preset, at temperature 1.

    Args:
        preset: seeds, betas, data.
        betas: others than the preset's.
        records: for each seed what to train on; None makes pairs (or rankings) from the training split.
        options: method and more arguments of `run_preference`; {"method": "sft"} is the point at KL 0.
    """
    return run_frontiers(preset, {"": {"betas": betas, "records": records, **options}})[""]


def run_frontiers(preset: Preset | str, arguments: dict[str, dict]) -> dict[str, Frontier]:
    """`run_frontier(preset, **each)` for each of the named arguments; as one list of stages, so that no core waits between."""
    preset = get_preset(preset)
    betas, settings = {}, []
    for name, options in arguments.items():
        options = dict(options)
        records = options.pop("records", None)
        betas[name] = tuple(options.pop("betas", None) or ((None,) if options["method"] == "sft" else preset.betas))
        for seed in preset.seeds:
            of_seed = options | ({"records": records[seed]} if records else {})
            settings += [{"preset": preset, "beta": beta, "seed": seed, **of_seed} for beta in betas[name]]
    measured = iter(run_all(run_win_rate, settings))
    frontiers = {}
    for name, of_name in betas.items():
        stages = tuple(itertools.islice(measured, len(preset.seeds) * len(of_name)))
        kl, score = (
            np.array([each.column(key) for each in stages]).reshape(len(preset.seeds), len(of_name), -1)
            for key in ("kl", "score" if preset.data == "toy" else "win")
        )
        frontiers[name] = Frontier(of_name, kl, score, stages)
    return frontiers


def run_info(preset: Preset, stages: list) -> dict:
    """What a figure was made with: its preset, data, model and seeds, the machine of each stage, minutes, peak memory.

    Args:
        preset: of the stages.
        stages: Runs and Evaluations that the figure was drawn from.
    """
    records = [json.loads((stage.path / "stage.json").read_text(encoding="utf-8")) for stage in stages]
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


def _with_cached_reference(sft: Run, policy, rows: list[Row]) -> list[Row]:
    """`with_reference_logps`, kept in a file beside the SFT stage: runs of all methods and betas share it."""
    content = [sft.path.name, sft.preset.precision, [row.sequences for row in rows]]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10]
    path = sft.path.with_name(f"{sft.path.name}-reference-{key}.json")
    if not on_leader(path.exists):
        preset = sft.preset
        done = with_reference_logps(policy, rows, micro_batch_size=preset.micro_batch_size, precision=preset.precision)
        on_leader(lambda: write_json(path, [row.reference_logps for row in done]))
    stored = json.loads(path.read_text(encoding="utf-8"))
    return [replace(row, reference_logps=tuple(values)) for row, values in zip(rows, stored, strict=True)]


def _train(folder: Path, preset: Preset, policy, tokenizer, rows, config: TrainConfig, *, held_out, measure=None) -> None:
    history = train(
        policy, rows, config, held_out=held_out, measure=measure,
        evaluate_every=max(config.steps // preset.num_evaluations, 1),
        checkpoint=folder / "checkpoint.pt", checkpoint_seconds=preset.checkpoint_seconds,
    )  # fmt: skip
    if not is_leader():
        return
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    write_json(folder / "history.json", history)
    for left in folder.glob("*checkpoint.pt*"):  # also one that a killed process was writing
        left.unlink()


def _load_run(preset: Preset, path: Path, config: dict) -> Run:
    return Run(path, preset, config, json.loads((path / "history.json").read_text(encoding="utf-8")))


def _files(source: str | None):
    """A model folder as its files' names, sizes and times; a hub name as itself."""
    if source is None or not Path(source).is_dir():
        return source
    stats = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(Path(source).iterdir()) if path.is_file()
    ]
    return [str(Path(source).resolve()), *stats]


def copy_run(run: Run, target: Path) -> Path:
    """Copies a run's policy, tokenizer, history and record to `target`, a folder that must not hold anything yet."""
    check_new_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copytree(run.path / "policy", temporary)
    for name in ("history.json", "stage.json"):
        shutil.copy(run.path / name, temporary / name)
    if target.exists():
        target.rmdir()
    os.replace(temporary, target)
    return target
