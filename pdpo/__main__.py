"""The command line: `python -m pdpo run` executes the notebooks, `train` trains on a preference file, `export-trl` hands over."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from pdpo import data, experiments
from pdpo.evaluation import bootstrap_interval
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
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--data", help=".json or .jsonl with prompt, chosen, rejected [chosen_score, rejected_score], or a name")
    both.add_argument("--beta", type=float, default=0.1, help=f"{BETA}; default: 0.1")
    both.add_argument("--preset", choices=PRESETS, help="default: gpt2-medium on a GPU, else small")
    both.add_argument("--model", help="a folder or hub name of a causal language model; default: the preset's")
    both.add_argument("--tokenizer", help="a folder or hub name; default: the model's, or a BPE trained on the data")
    both.add_argument("--sft-steps", type=int, help="optimizer steps of SFT; default: the preset's")
    both.add_argument("--steps", type=int, help="optimizer steps of each preference run; default: the preset's")
    both.add_argument("--lr", type=float, help="peak learning rate of preference training; default: the preset's")
    both.add_argument("--seed", type=int, default=0)
    train = commands.add_parser("train", parents=[both], help="SFT, then preference training, on a preference file")
    train.add_argument("--method", nargs="+", choices=METHODS, default=["dpo"], help="default: dpo; SFT always comes first")
    train.add_argument("--alpha", type=float, help="ODPO's strength; default: the preset's")
    train.add_argument("--out", type=Path, help="a new folder for the policy (a folder in it for each, of several methods)")
    export = commands.add_parser("export-trl", parents=[both], help="SFT, then a folder from which `trl dpo` goes on")
    export.add_argument("target", type=Path, metavar="DIR", help="a new folder")
    export.add_argument("--method", choices=METHODS, default="dpo", help="dpo, the one that TRL's DPOTrainer can do as we do")
    options = parser.parse_args(arguments)
    try:
        return {"run": _run, "train": _train, "export-trl": _export_trl}[options.command](options)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from pdpo.runner import run_notebooks  # needs nbclient, which training does not

    preset = experiments.start(options.preset)
    return 0 if run_notebooks(preset, options.notebooks, jobs=options.jobs, save=options.save) else 1


def _preset(options: argparse.Namespace) -> Preset:
    """The preset that fits, with what the options change of it."""
    name = options.preset or ("gpt2-medium" if device().type == "cuda" else "small")
    changes = {
        "data": options.data, "model": options.model, "tokenizer": options.tokenizer, "sft_steps": options.sft_steps,
        "preference_steps": options.steps, "preference_lr": options.lr, "alpha": getattr(options, "alpha", None),
    }  # fmt: skip
    return replace(experiments.get_preset(name), **{key: value for key, value in changes.items() if value is not None})


def _train(options: argparse.Namespace) -> int:
    if options.out is not None:
        experiments.check_new_folder(options.out)
    preset = _preset(options)
    records = data.load_preferences(preset.data)  # bad input is refused before anything is trained
    for method in set(options.method) - {"sft"}:
        TrainConfig(method, preset.preference_steps, preset.preference_batch_size, preset.preference_lr, beta=options.beta)
    experiments.start(preset)
    parts = data.load_split(preset.data)
    print("prompts of {} rows: {} to train on, {} to watch, {} to test".format(len(records), *map(len, parts)))

    sft = experiments.run_sft(preset, seed=options.seed)
    report = data.data_report(records, sft.load_tokenizer())
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
        if options.out is not None and method in options.method:
            target = options.out if len(options.method) == 1 else options.out / method
            print(f"{method}: saved in {experiments.copy_run(run, target)}")
    return 0


def _export_trl(options: argparse.Namespace) -> int:
    from pdpo.export import export_trl

    preset = experiments.start(_preset(options))
    target = export_trl(preset, options.target, beta=options.beta, method=options.method, seed=options.seed)
    print(f"{preset.preference_steps} steps of {preset.preference_batch_size} pairs, for TRL; go on with:")
    print(f"  cd {target} && trl dpo --config dpo.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
