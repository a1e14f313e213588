"""The experiments that notebooks call. Each is a named stage, which takes its parent; a second call returns at once.

    sft = run_sft(preset, seed=0)
    dpo = run_preference(sft, method="dpo", beta=0.3)
    wins = run_win_rate(dpo, temperature=1.0)

beta: KL strength; a larger beta keeps the policy closer to the reference."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import transformers

from pdpo import making
from pdpo.data import Preference, fingerprint, load_split, pairs
from pdpo.device import device, num_cores
from pdpo.distributed import is_leader, launch_size, world_size
from pdpo.encoding import encode_records
from pdpo.evaluation import fit_reward_head, sequence_kl, toy_grades, win_values
from pdpo.files import read_json, shown, source_digest, write_json
from pdpo.making import sampled_kl, save_in, score_of, train_in, with_cached_reference
from pdpo.models import judge_digest, load_judge, load_policy, load_tokenizer, model_revision, with_reward_head
from pdpo.presets import ONLINE, Preset, betas_of, get_preset
from pdpo.reach import SOURCES, read_sources
from pdpo.results import Evaluation, RewardModel, Run, run_info  # noqa: F401  (the last one is for notebooks)
from pdpo.rl import train_online
from pdpo.rows import Row, preference_rows
from pdpo.sampling import sample
from pdpo.stages import num_runs_at_a_time, run_all, run_stage, runs_dir
from pdpo.statistics import Frontier
from pdpo.training import drawn_rows

if read_sources() != SOURCES:  # modules are imported when first needed: which of the two texts runs, nobody could say
    raise ValueError("pdpo: its files have changed since this process first imported it. Restart the kernel, or the program.")


def start(preset: str | Preset | None = None) -> Preset:
    """Chooses the preset, says what it runs on and where results go, and sets the number of threads (`Preset.num_threads`).

    preset: a preset or its name; None is $PDPO_PRESET, else the one that fits the machine."""
    chosen = get_preset(preset)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    num_threads = max(chosen.num_threads // launch_size(), 1)
    if device().type == "cpu":
        torch.set_num_threads(num_threads)
        num_threads = min(num_threads, max(num_cores() // num_runs_at_a_time(), 1))
    processes = f"{world_size()} processes, " if world_size() > 1 else ""
    cpu = f"CPU, {num_threads} of {num_cores()} cores a run"
    hardware = torch.cuda.get_device_name() if device().type == "cuda" else cpu
    where = f"data {chosen.data}, results in {shown(runs_dir() / chosen.name)}"
    print(f"preset {chosen.name}: {processes}{hardware}, {chosen.precision}, {where}")
    if chosen.data != "toy":
        print(f"the text tells of the toy (preset tiny); here the data is {chosen.data}: read the figures instead")
    return chosen


def run_sft(preset: Preset | str, *, seed: int = 0) -> Run:
    """Supervised fine-tuning on the training split's responses, with `preset.sft`.

    seed: of random weights and of the order of the rows."""
    preset = get_preset(preset)
    config = replace(preset.sft, seed=seed)
    train_records, validation, _ = load_split(preset.data)

    def build(folder: Path) -> dict:
        tokenizer = load_tokenizer(preset, train_records)
        policy = load_policy(preset, tokenizer=tokenizer, seed=seed).to(device())
        num = None if preset.sft_all_responses else 1
        rows, held_out = (
            [Row((each,)) for encoded in encode_records(tokenizer, records) for each in encoded[:num]]
            for records in (train_records, validation)
        )
        train_in(folder, preset, policy, tokenizer, rows, config, held_out=held_out)
        return {"model": preset.model, "model_revision": model_revision(preset.model)}  # which nothing pins

    determinants = {
        "train": asdict(config), "data": fingerprint(train_records + validation), "all_responses": preset.sft_all_responses,
        "preset": {key: getattr(preset, key) for key in ("vocab_size", "embedding", "layers", "heads", "context")},
        "model": source_digest(preset.model), "tokenizer": source_digest(preset.tokenizer),
    }  # fmt: skip
    path = run_stage(preset.name, f"sft-seed{seed}", determinants, build, together=True)
    return Run(path, preset, config, read_json(path / "history.json"))


def run_preference(
    sft: Run, *, method: str, beta: float | None = None, records: list[Preference] | None = None, **changes
) -> Run:
    """Preference training from an SFT run, which is the reference; pairs are drawn and shuffled by that run's seed.

    Args: method: one of `presets.METHODS` but SFT. ODPO where the data has no scores, and e-DPO where any are missing, take those
              of `run_reward_model`; DRDO always takes those of `run_oracle` on the same pairs. PPO and RLOO are `run_online`.
          beta: KL strength; a larger beta keeps the policy closer to the reference. None for DRDO, SimPO and ORPO, which have none.
          records: what to train on: pairs, or rankings for "plackett_luce"; None makes them from the training split.
          changes: other hyperparameters than those of the preset (`preset.preference`): fields of `TrainConfig`, such as
              alpha, steps or num_evaluations (held-out measurements take a third of a run's time)."""
    preset = sft.preset
    if method in ONLINE:
        if records is not None:
            raise ValueError(f"run_preference: expected records None for {method}, which learns from its own samples.")
        return run_online(sft, method=method, beta=beta, **changes)
    config = replace(preset.preference, method=method, beta=beta, **{"seed": sft.seed} | changes)
    train_records, validation, _ = load_split(preset.data)
    ranked = method == "plackett_luce"
    held_out_records = validation if ranked else pairs(validation)
    if records is None:
        records = train_records if ranked else pairs(train_records, num_per_prompt=preset.pairs_per_prompt, seed=sft.seed)
    num_unscored = sum(record.scores is None for record in records + held_out_records)
    unscored = num_unscored > 0 if method == "edpo" else method == "odpo" and not any(record.scores for record in records)
    if unscored and method == "odpo" and config.offset_scale == "log_ratio":
        wanted, got = "offset_scale 'log', 'identity' or 'mean' for data without scores", "'log_ratio', which needs scores > 0"
        raise ValueError(f"run_preference: expected {wanted}, got {got}: those of a reward model lie around 0.")
    reward_model = run_oracle(sft, records=records) if method == "drdo" else run_reward_model(sft) if unscored else None

    def build(folder: Path) -> None:
        scored, scored_held_out = records, held_out_records
        if reward_model:
            why = "the oracle is" if method == "drdo" else f"{num_unscored} of the pairs have no scores; all take those of"
            print(f"{method}: {why} {reward_model}")
            scored, scored_held_out = reward_model.scored(records), reward_model.scored(held_out_records)
        tokenizer, policy = sft.load_tokenizer(), sft.load_policy()  # which at this moment is the reference, too
        rows, held_out = (preference_rows(tokenizer, each, config) for each in (scored, scored_held_out))
        if method == "drdo":
            with_reward_head(policy, seed=config.seed)
        else:
            rows = with_cached_reference(sft, policy, rows, drawn_rows(len(rows), config))
            held_out = with_cached_reference(sft, policy, held_out, range(len(held_out)))

        def measure(policy) -> dict:
            # read from disk each time (tiny: 0.03 s), where it takes the room of the gradients, instead of kept in memory
            return sampled_kl(policy, sft.load_policy(), tokenizer, validation, sft)[1]

        train_in(folder, preset, policy, tokenizer, rows, config, held_out=held_out, measure=measure)

    determinants = {
        "train": asdict(config), "sft": sft.path.name, "reward_model": reward_model and reward_model.path.name,
        "data": fingerprint(records + held_out_records), "precision": preset.precision,
        "num_kl_prompts": preset.num_kl_prompts, "max_new_tokens": preset.max_new_tokens,
    }  # fmt: skip
    name = f"{method}-seed{config.seed}" if beta is None else f"{method}-beta{beta:g}-seed{config.seed}"
    path = run_stage(preset.name, name, determinants, build, together=True)
    return Run(path, preset, config, read_json(path / "history.json"), sft)


def run_online(sft: Run, *, method: str, beta: float, reward: str | Sequence[RewardModel] = "learned", **changes) -> Run:
    """PPO or RLOO ("ppo", "rloo") from an SFT run, which is the reference, on the training prompts.

    Args: beta: KL strength; a larger beta keeps the policy closer to the reference. In units of the score's standard deviation.
          reward: "learned" trains `run_oracle`, a reward model over the whole network, first; "toy-gold" is the toy's own score; of
              several reward models the smallest score counts. Each has mean 0 and standard deviation 1 on the training responses.
          changes: other hyperparameters than those of `preset.online`: fields of `OnlineConfig`."""
    preset = sft.preset
    config = replace(preset.online, method=method, beta=beta, **{"seed": sft.seed} | changes)
    if isinstance(reward, str) and (reward not in ("learned", "toy-gold") or (reward == "toy-gold" and preset.data != "toy")):
        got = f"{reward!r} on {preset.data}"
        raise ValueError(f"run_online: expected reward 'learned', reward models, or on the toy 'toy-gold', got {got}.")
    train_records, validation, _ = load_split(preset.data)
    models = (run_oracle(sft),) if reward == "learned" else () if reward == "toy-gold" else tuple(reward)

    def build(folder: Path) -> None:
        tokenizer, policy, reference = sft.load_tokenizer(), sft.load_policy(), sft.load_policy()
        score, asked, num = score_of(models, train_records), [record.prompt for record in train_records], preset.max_new_tokens

        def measure(policy) -> dict:
            samples, numbers = sampled_kl(policy, reference, tokenizer, validation, sft)
            numbers["eval_score"] = float(score(samples).mean())
            numbers["eval_loss"] = beta * numbers["eval_kl"] - numbers["eval_score"]  # minus what is maximised
            return numbers | ({"eval_gold": float(toy_grades(samples)["score"].mean())} if preset.data == "toy" else {})

        kept = {"checkpoint": folder / "checkpoint.pt", "checkpoint_seconds": preset.checkpoint_seconds}
        history = train_online(policy, reference, tokenizer, asked, score, config, max_new_tokens=num, measure=measure, **kept)
        save_in(folder, policy, tokenizer, history)

    determinants = {
        "train": asdict(config), "sft": sft.path.name, "reward": [model.path.name for model in models] or "toy-gold",
        "data": fingerprint(train_records + validation),
        "num_kl_prompts": preset.num_kl_prompts, "max_new_tokens": preset.max_new_tokens,
    }  # fmt: skip
    path = run_stage(preset.name, f"{method}-beta{beta:g}-seed{config.seed}", determinants, build)
    return Run(path, preset, config, read_json(path / "history.json"), sft)


def run_reward_model(sft: Run) -> RewardModel:
    """A linear reward model on the SFT policy, fitted to the training split's pairs (drawn by its seed), tried on the test split's.

    It sees which response is better, never the data's scores. `run_preference` takes its scores for ODPO where the data has none."""
    preset = sft.preset
    train_records, _, test = load_split(preset.data)
    drawn, held_out = pairs(train_records, num_per_prompt=preset.pairs_per_prompt, seed=sft.seed), pairs(test)

    def build(folder: Path) -> None:
        policy, tokenizer = sft.load_policy(), sft.load_tokenizer()
        weights = fit_reward_head(making.features_of(policy, tokenizer, drawn, preset))
        making.write_reward_model(folder, weights, policy, tokenizer, held_out, preset)

    determinants = {"sft": sft.path.name, "precision": preset.precision, "data": fingerprint(drawn + held_out)}
    path = run_stage(preset.name, f"reward_model-seed{sft.seed}", determinants, build)
    return making.read_reward_model(path, sft, num_pairs=len(drawn))


def run_oracle(sft: Run, *, records: list[Preference] | None = None, **changes) -> RewardModel:
    """DRDO's oracle: a linear head on the last hidden state of the SFT policy, trained together with the whole of it.

    To the loss of the labels comes a little of that of the better responses as text. The steps are a preference run's, the peak
    rate is SFT's, since the head begins at random weights.

    Args: records: pairs to train on; None draws them from the training split. It is tried on those of the test split.
          changes: other hyperparameters, as for `run_preference`; the seed is also that of the head's weights.
    Source: Nath 2024, arXiv:2410.08458, Eq. 5."""
    preset = sft.preset
    config = replace(preset.preference, method="oracle", beta=None, **{"lr": preset.sft.lr, "seed": sft.seed} | changes)
    train_records, validation, test = load_split(preset.data)
    if records is None:
        records = pairs(train_records, num_per_prompt=preset.pairs_per_prompt, seed=sft.seed)
    watched, held_out = pairs(validation), pairs(test)

    def build(folder: Path) -> None:
        tokenizer, policy = sft.load_tokenizer(), with_reward_head(sft.load_policy(), seed=config.seed)
        rows, watched_rows = (preference_rows(tokenizer, each, config) for each in (records, watched))
        train_in(folder, preset, policy, tokenizer, rows, config, held_out=watched_rows)
        if is_leader():
            weights = torch.tensor(read_json(folder / "policy" / "reward_head.json")["weights"])
            making.write_reward_model(folder, weights, policy, tokenizer, held_out, preset)

    data = fingerprint(records + watched + held_out)
    determinants = {"train": asdict(config), "sft": sft.path.name, "precision": preset.precision, "data": data}
    path = run_stage(preset.name, f"oracle-seed{config.seed}", determinants, build, together=True)
    run = Run(path, preset, config, read_json(path / "history.json"), sft)
    return making.read_reward_model(path, run, num_pairs=len(records))


def run_win_rate(
    run: Run, *, temperature: float = 1.0, reference: Run | None = None, records: list[Preference] | None = None, top_p: float = 1.0
) -> Evaluation:  # fmt: skip
    """Samples of one run's policy on the test prompts, or on those of `records`, judged by SBERT and, on `toy`, graded.

    Args: run: of SFT or of a preference method; its preset names test prompts, judge, and samples a prompt (one at temperature
              0), of which the first `num_judged` go to the judge, and are what the KL is measured on.
          temperature: of the sampling, >= 0; its seed is the run's, so that all runs of a seed meet the same noise.
          reference: what the KL is measured from; None is the SFT run that it started from.
          records: prompts to answer, with their best and worst responses for the judge; None is the test split.
          top_p: see `sample`; with less than 1 no KL is measured, as at other temperatures than 1."""
    preset, sft = run.preset, reference or run.sft
    test = load_split(preset.data)[2] if records is None else records
    num_samples = preset.num_samples if temperature > 0 else 1
    num_judged = min(preset.num_judged, num_samples)

    def build(folder: Path) -> None:
        policy, tokenizer, prompts = run.load_policy(), run.load_tokenizer(), [record.prompt for record in test]
        options = {"temperature": temperature, "top_p": top_p, "num_samples": num_samples, "seed": run.seed}
        length = {"max_new_tokens": preset.max_new_tokens, "precision": preset.precision}
        samples = sample(policy, tokenizer, prompts, **options, **length)
        repeated = [record for record in test for _ in range(num_samples)]
        chosen, rejected = [record.responses[0] for record in repeated], [record.responses[-1] for record in repeated]
        judged = [i for i in range(len(samples)) if i % num_samples < num_judged]
        few, better, worse = ([each[i] for i in judged] for each in (samples, chosen, rejected))
        closer = {}
        if judged:
            judge = load_judge(preset, cache_dir=runs_dir() / "judge")
            closer["win"] = win_values(judge, [each.text for each in few], better, worse)
        if judged and temperature == 1 == top_p:
            kl = sequence_kl(policy, sft.load_policy(), few, batch_size=preset.micro_batch_size, precision=preset.precision)
            closer |= {"kl": kl.exact, "kl_k1": kl.k1, "kl_k3": kl.k3, "num_tokens": kl.num_tokens}
        rows = [
            {"prompt": each.prompt, "text": each.text, "finished": each.finished, "chosen": good, "rejected": bad}
            for each, good, bad in zip(samples, chosen, rejected, strict=True)
        ]
        for indices, columns in ((judged, closer), (range(len(rows)), toy_grades(samples) if preset.data == "toy" else {})):
            for key, values in columns.items():
                for i, value in zip(indices, values, strict=True):
                    rows[i][key] = float(value)
        write_json(folder / "rows.json", rows)

    determinants = {
        "run": run.path.name, "sft": sft.path.name, "data": fingerprint(test), "seed": run.seed, "temperature": temperature,
        "top_p": top_p, "num_samples": num_samples, "num_judged": num_judged, "max_new_tokens": preset.max_new_tokens,
        "judge": judge_digest(preset.judge), "precision": preset.precision, "graded": preset.data == "toy",
    }  # fmt: skip
    name = f"win_rate-{run.path.name.rsplit('-', 1)[0]}-temperature{temperature:g}"
    path = run_stage(preset.name, name, determinants, build)
    return Evaluation(path, run, read_json(path / "rows.json"), num_samples)


def run_frontier(
    sfts: list[Run], *, method: str, betas: tuple[float, ...] | None = None, records: dict | None = None, **changes
) -> Frontier:
    """Trains and measures one method at every beta from every SFT run, one a seed, at temperature 1.

    Args: method, changes: of `run_preference`; "sft" is the point at KL 0, and with best_only=True SFT on the best responses alone.
          betas: others than the preset's.
          records: for each seed what to train on; None makes pairs (or rankings) from the training split."""
    options = {"method": method, "betas": betas, "records": records, **changes}
    return run_frontiers(sfts, {"": options})[""]


def run_frontiers(sfts: list[Run], arguments: dict[str, dict]) -> dict[str, Frontier]:
    """`run_frontier(sfts, **each)` for each of the named arguments; as one list of stages, so that no core waits between."""
    betas, settings = {}, []
    for name, options in arguments.items():
        options = dict(options)
        records = options.pop("records", None)
        betas[name] = betas_of(options["method"], options.pop("betas", None) or sfts[0].preset.betas)
        for sft in sfts:
            of_seed = options | ({"records": records[sft.seed]} if records else {})
            settings += [{"sft": sft, "beta": beta, **of_seed} for beta in betas[name]]
    measured = iter(run_all(_trained_and_measured, settings))
    of = {name: list(itertools.islice(measured, len(sfts) * len(each))) for name, each in betas.items()}
    return {name: frontier_of(betas[name], stages, num_seeds=len(sfts)) for name, stages in of.items()}


def frontier_of(betas: tuple[float | None, ...], stages: list[Evaluation], *, num_seeds: int) -> Frontier:
    """The frontier of one method's evaluations: all betas of the first seed, then of the next."""
    kl, score = (
        np.array([each.column(key) for each in stages]).reshape(num_seeds, len(betas), -1)
        for key in ("kl", "score" if stages[0].run.preset.data == "toy" else "win")
    )
    return Frontier(betas, kl, score, tuple(stages))


def _trained_and_measured(sft: Run, *, method: str, beta: float | None, best_only: bool = False, **options) -> Evaluation:
    if method != "sft":
        return run_win_rate(run_preference(sft, method=method, beta=beta, **options))
    run = run_sft(replace(sft.preset, sft_all_responses=False), seed=sft.seed) if best_only else sft
    return run_win_rate(run, reference=sft)


def bootstrapped_rankings(sft: Run, *, num_samples: int) -> tuple[list[Preference], dict[str, int]]:
    """Rankings made of the SFT policy's own samples to the toy's training prompts, num_samples of each at temperature 1, graded
    by the truth.

    Returns: One record a prompt with at least two different scores, best first, of each score one sample, so that no pair is a
        tie; and counts: samples, empty, tied (left out, as their prompt has another sample of that score), prompts_left_out.
    Source: Amini 2024, arXiv:2402.10571, Eq. 17."""
    prompts = [record.prompt for record in load_split("toy")[0]]
    options = {"max_new_tokens": sft.preset.max_new_tokens, "seed": sft.seed, "num_samples": num_samples}
    samples = sample(sft.load_policy(), sft.load_tokenizer(), prompts, temperature=1.0, **options)
    by_score: dict[str, dict[float, str]] = {prompt: {} for prompt in prompts}
    for each, score in zip(samples, toy_grades(samples)["score"].tolist(), strict=True):
        if each.text:
            by_score[each.prompt].setdefault(score, each.text)
    rankings = {prompt: sorted(found.items(), reverse=True) for prompt, found in by_score.items() if len(found) > 1}
    records = [Preference(prompt, *list(zip(*found, strict=True))[::-1]) for prompt, found in rankings.items()]
    empty = sum(not each.text for each in samples)
    tied = len(samples) - empty - sum(map(len, by_score.values()))
    return records, {"samples": len(samples), "empty": empty, "tied": tied, "prompts_left_out": len(prompts) - len(records)}
