"""The command line: `run` executes the notebooks, `train` trains on a preference file, `sweep` for every beta, `export-trl` hands over,
`grade` marks exercises."""

import argparse
import contextlib
import csv
import io
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from pdpo import data, experiments
from pdpo.distributed import claim_gpu, is_leader, launch_rank, launch_size, process_group
from pdpo.evaluation import bootstrap_interval, with_interval
from pdpo.presets import PRESETS, Preset, device
from pdpo.training import METHODS, TrainConfig

BETA = "KL strength; a larger beta keeps the policy closer to the reference"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 where a notebook failed, 2 where the input was bad."""
    parser = argparse.ArgumentParser(prog="python -m pdpo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the notebooks and write their figures")
    run.add_argument("--preset", choices=PRESETS, help="default: the one that fits this machine")
    run.add_argument("--notebooks", nargs="+", metavar="NN", help="numbers, such as 06 07 08; default: all")
    run.add_argument("--jobs", type=int, help="notebooks at a time; default: 2 on a CPU with two cores or more, else 1")
    run.add_argument("--save", action="store_true", help="write the outputs into notebooks/ (for maintainers)")
    methods = {"nargs": "+", "choices": METHODS, "default": ["dpo"], "help": "default: dpo; SFT always comes first"}
    alpha = {"type": float, "help": "ODPO's strength; default: the preset's"}
    train = commands.add_parser("train", help="SFT, then preference training, on a preference file", parents=[_training()])
    train.add_argument("--method", **methods)
    train.add_argument("--alpha", **alpha)
    train.add_argument("--beta", type=float, default=0.1, help=f"{BETA}; default: 0.1")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", type=Path, help="a new folder for the policy (a folder in it for each, of several methods)")
    sweep = commands.add_parser("sweep", help="train and measure every method, beta and seed", parents=[_training()])
    sweep.add_argument("--method", **methods)
    sweep.add_argument("--alpha", **alpha)
    sweep.add_argument("--beta", type=float, nargs="+", help=f"{BETA}; default: the preset's")
    sweep.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    sweep.add_argument("--out", type=Path, help="a new CSV file for the table")
    export = commands.add_parser("export-trl", help="SFT, then a folder from which `trl dpo` goes on", parents=[_training()])
    export.add_argument("target", type=Path, metavar="DIR", help="a new folder")
    export.add_argument("--method", choices=METHODS, default="dpo", help="dpo, the one that TRL's DPOTrainer can do as we do")
    export.add_argument("--beta", type=float, default=0.1, help=f"{BETA}; default: 0.1")
    export.add_argument("--seed", type=int, default=0)
    grade = commands.add_parser("grade", help="check the functions in a folder of exercise notebooks")
    grade.add_argument("folder", type=Path, metavar="DIR", help="the notebooks handed in; a sub-folder is a student's")
    grade.add_argument("--out", type=Path, default=Path("grades.csv"), help="a new CSV file; default: grades.csv")
    grade.add_argument("--jobs", type=int, help="notebooks at a time; default: one a core, two at most")
    grade.add_argument("--seed", type=int, help="of the inputs that the checks draw; default: a new one, which is printed")
    grade.add_argument("--seconds", type=int, default=60, help="of processor time for a cell or a call; default: 60")
    grade.add_argument("--megabytes", type=int, default=2048, help="of memory beyond what torch takes; default: 2048")
    grade.add_argument("--user", type=int, help="run the notebooks as the user of this number (only root can)")
    options = parser.parse_args(arguments)
    command = {"run": _run, "train": _train, "sweep": _sweep, "export-trl": _export_trl, "grade": _grade}[options.command]
    try:
        with contextlib.redirect_stdout(io.StringIO()) if launch_rank() > 0 else contextlib.nullcontext():
            return command(options)
    except ValueError as error:
        if launch_rank() > 0:
            time.sleep(5)  # where process 0 says the same, torchrun meanwhile ends this one
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _training() -> argparse.ArgumentParser:
    """The options of all commands that train."""
    train = argparse.ArgumentParser(add_help=False)
    train.add_argument("--data", help=".json or .jsonl with prompt, chosen, rejected [chosen_score, rejected_score], or a name")
    train.add_argument("--preset", choices=PRESETS, help="default: gpt2-medium on a GPU, else small")
    train.add_argument("--model", help="a folder or hub name of a causal language model; default: the preset's")
    train.add_argument("--tokenizer", help="a folder or hub name; default: the model's, or a BPE trained on the data")
    train.add_argument("--sft-steps", type=int, help="optimizer steps of SFT; default: the preset's")
    train.add_argument("--steps", type=int, help="optimizer steps of each preference run; default: the preset's")
    train.add_argument("--lr", type=float, help="peak learning rate of preference training; default: the preset's")
    return train


def _run(options: argparse.Namespace) -> int:
    from pdpo.runner import run_notebooks  # needs nbclient, which training does not

    preset = experiments.start(options.preset)
    return 0 if run_notebooks(preset, options.notebooks, jobs=options.jobs, save=options.save) else 1


def _preset(options: argparse.Namespace) -> Preset:
    """The preset that the options of `_training` ask for."""
    name = options.preset or ("gpt2-medium" if device().type == "cuda" else "small")
    changes = {
        "data": options.data, "model": options.model, "tokenizer": options.tokenizer, "sft_steps": options.sft_steps,
        "preference_steps": options.steps, "preference_lr": options.lr, "alpha": getattr(options, "alpha", None),
    }  # fmt: skip
    return replace(experiments.get_preset(name), **{key: value for key, value in changes.items() if value is not None})


def _start(preset: Preset, methods: list[str], betas: list[float]) -> list[data.Preference]:
    """The preset's records; bad input is refused before anything is trained."""
    records = data.load_preferences(preset.data)
    for method in set(methods) - {"sft"}:
        for beta in betas:
            TrainConfig(method, preset.preference_steps, preset.preference_batch_size, preset.preference_lr, beta=beta)
    experiments.start(preset)
    parts = data.load_split(preset.data)
    print("prompts of {} rows: {} to train on, {} to watch, {} to test".format(len(records), *map(len, parts)))
    return records


@process_group()
def _train(options: argparse.Namespace) -> int:
    if options.out is not None:
        experiments.check_new_folder(options.out)
    preset = _preset(options)
    records = _start(preset, options.method, [options.beta])
    sft = experiments.run_sft(preset, seed=options.seed)
    report = data.data_report(records, sft.load_tokenizer())
    del report["leaked_prompts"]  # of a whole file nothing is held out
    print("data: " + ", ".join(f"{key} {value}" for key, value in report.items()))
    for method in dict.fromkeys(["sft", *options.method]):
        settings = {"method": method, "beta": None if method == "sft" else options.beta, "seed": options.seed}
        run = sft if method == "sft" else experiments.run_preference(preset, **settings)
        measured = [row for row in run.history if "eval_loss" in row]
        numbers = {key: (measured[0][key], measured[-1][key]) for key in measured[0] if key.startswith("eval_")}
        print(
            f"{method}: held out, before -> after: " + ", ".join(f"{k[5:]} {a:.3f} -> {b:.3f}" for k, (a, b) in numbers.items())
        )
        evaluation = experiments.run_win_rate(preset, **settings)
        wins = evaluation.column("win")
        (low, high), ties = bootstrap_interval(wins), sum(row["win"] == 0.5 for row in evaluation.rows) / len(evaluation.rows)
        print(
            f"{method}: SBERT win rate {wins.mean():.3f} [{low:.3f}, {high:.3f}], ties {ties:.3f}, at temperature 1 ({len(wins)} prompts)"
        )
        for row in evaluation.rows[:: max(len(evaluation.rows) // 2, 1)][:2]:
            print(f"  {row['prompt'][:70]!r} -> {row['text'][:90]!r}")
        if options.out is not None and method in options.method and is_leader():
            target = options.out if len(options.method) == 1 else options.out / method
            print(f"{method}: saved in {experiments.copy_run(run, target)}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    """Under torchrun every process walks the same list from a place of its own; the stages' locks share out the work."""
    claim_gpu()
    if options.out is not None and options.out.exists() and launch_rank() == 0:
        raise ValueError(f"{options.out}: expected a new file, got one that exists. Choose another name.")
    preset = _preset(options)
    betas = options.beta or preset.betas
    _start(preset, options.method, betas)
    settings = [
        {"preset": preset, "method": method, "beta": beta, "seed": seed}
        for seed in dict.fromkeys(options.seeds)
        for method in dict.fromkeys(options.method)
        for beta in (dict.fromkeys(betas) if method != "sft" else [None])
    ]
    first = len(settings) * launch_rank() // launch_size()
    measured = experiments.run_all(experiments.run_win_rate, settings[first:] + settings[:first])
    if launch_rank() > 0:
        return 0
    rows = [_measurements(setting, evaluation) for setting, evaluation in zip(settings, measured, strict=True)]
    lines = [list(rows[0])] + [
        [f"{value:.3f}" if key not in ("method", "beta", "seed") else f"{value}" for key, value in row.items()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.out.with_name(f".{options.out.name}.{os.getpid()}")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, options.out)
        print(f"saved in {options.out}")
    return 0


def _measurements(setting: dict, evaluation: experiments.Evaluation) -> dict:
    """A line of the sweep's table: held-out loss in nats, KL in nats a response, shares of wins, and on `toy` the gold score."""
    is_sft = setting["method"] == "sft"
    run = experiments.run_sft(setting["preset"], seed=setting["seed"]) if is_sft else experiments.run_preference(**setting)
    score = {"score": float(evaluation.column("score").mean())} if "score" in evaluation.rows[0] else {}
    return {
        **{"method": run.method, "beta": "" if is_sft else run.beta, "seed": run.seed},
        **{"eval_loss": run.history[-1]["eval_loss"], "kl": float(evaluation.column("kl").mean())},
        **with_interval("win", evaluation.column("win")),
        **score,
    }


def _export_trl(options: argparse.Namespace) -> int:
    from pdpo.export import export_trl

    preset = experiments.start(_preset(options))
    target = export_trl(preset, options.target, beta=options.beta, method=options.method, seed=options.seed)
    print(f"{preset.preference_steps} steps of {preset.preference_batch_size} pairs, for TRL; go on with:")
    print(f"  cd {shlex.quote(str(target))} && trl dpo --config dpo.yaml")
    return 0


def _grade(options: argparse.Namespace) -> int:
    from pdpo.grading import Limits, grade

    limits = Limits(seconds=options.seconds, megabytes=options.megabytes, user=options.user)
    grade(options.folder, options.out, jobs=options.jobs, seed=options.seed, limits=limits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
