"""run executes the notebooks; train and sweep train on a preference file; sample asks a policy; export-trl hands over to TRL."""

import argparse
import contextlib
import io
import os
import signal
import sys
import time
from pathlib import Path

from pdpo.presets import METHODS, ONLINE, PRESETS

BETA = "KL strength; a larger beta keeps the policy closer to the reference"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 where a notebook failed, 2 where the input was bad."""
    parser = argparse.ArgumentParser(prog="python -m pdpo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the notebooks and write their figures")
    run.add_argument("--preset", choices=PRESETS, help="default: the one that fits this machine")
    run.add_argument("--notebooks", nargs="+", metavar="NN", help="numbers (06 07 08), or all; default: all but 10 to 13")
    run.add_argument("--jobs", type=int, help="notebooks at a time; default: 2 on a CPU with two cores or more, else 1")
    run.add_argument("--save", action="store_true", help="for maintainers: keep outputs in notebooks/ and figures in figures/")
    methods, one = _training(), argparse.ArgumentParser(add_help=False)
    of = {"nargs": "+", "choices": (*METHODS, *ONLINE), "default": ["dpo"]}
    methods.add_argument("--method", **of, help="default: dpo; SFT always comes first")
    methods.add_argument("--alpha", type=float, help="ODPO's strength; default: the preset's")
    one.add_argument("--beta", type=float, default=0.1, help=f"{BETA}; default: 0.1")
    one.add_argument("--seed", type=int, default=0)
    train = commands.add_parser("train", help="SFT, then preference training, on a preference file", parents=[methods, one])
    of = {"choices": ["learned", "toy-gold"], "default": "learned"}
    train.add_argument("--reward", **of, help="for ppo, rloo: a reward model, trained first (default), or the toy's score")
    train.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint, asked last; key: $OPENAI_API_KEY")
    train.add_argument("--judge-model", metavar="NAME", default="default", help="of that endpoint")
    train.add_argument("--judge-task", choices=["dialogue", "summary", "concise-summary"], default="dialogue")
    train.add_argument("--out", type=Path, help="a new folder for report.html and the policies, of several methods one each")
    train.add_argument("--log", choices=["tensorboard"], help="what else writes every step's numbers, when a training ends")
    sweep = commands.add_parser("sweep", help="train and measure every method, beta and seed", parents=[methods])
    sweep.add_argument("--beta", type=float, nargs="+", help=f"{BETA}; default: the preset's")
    sweep.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    sweep.add_argument("--out", type=Path, help="a new CSV file for the table; the frontier is drawn beside it")
    sweep.add_argument(
        "--scheduler", metavar="ADDRESS", help="a Dask cluster's, which makes the runs; default: this machine does"
    )
    export = commands.add_parser("export-trl", help="SFT, then a folder for `trl dpo` to go on", parents=[_training(), one])
    export.add_argument("target", type=Path, metavar="DIR", help="a new folder")
    export.add_argument("--method", choices=METHODS, default="dpo", help="dpo, the one that TRL's DPOTrainer can do as we do")
    ask = commands.add_parser("sample", help="what a trained policy answers")
    ask.add_argument("policy", type=Path, metavar="DIR", help="a folder that `train --out` wrote")
    ask.add_argument("prompt", nargs="*", help="prompts, each in quotes; default: the lines of standard input")
    ask.add_argument("--compare", type=Path, nargs="+", default=[], metavar="DIR", help="other folders, asked the same")
    ask.add_argument("--chat", action="store_true", help="ask one prompt after another; each is answered by itself")
    ask.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest token each time")
    ask.add_argument("--samples", type=int, default=1, help="answers to each prompt; default: 1")
    ask.add_argument("--max-new-tokens", type=int, default=64, help="default: 64, or half of what the policy was trained with")
    ask.add_argument("--seed", type=int, default=0, help="all policies meet the same noise; default: 0")
    grade = commands.add_parser("grade", help="check the functions in a folder of exercise notebooks")
    grade.add_argument("folder", type=Path, metavar="DIR", help="the notebooks handed in; a sub-folder is a student's")
    grade.add_argument("--out", type=Path, default=Path("grades.csv"), help="a new CSV file; default: grades.csv")
    grade.add_argument("--jobs", type=int, help="notebooks at a time; default: one a core, two at most")
    grade.add_argument("--seed", type=int, help="of the inputs that the checks draw; default: a new one, which is printed")
    grade.add_argument("--seconds", type=int, default=60, help="of processor time for a cell or a call; default: 60")
    grade.add_argument("--megabytes", type=int, default=2048, help="of memory beyond what torch takes; default: 2048")
    grade.add_argument("--user", type=int, help="run the notebooks as the user of this number (only root can)")
    runs = commands.add_parser("runs", help="what is kept in runs/, and whether it is current")
    runs.add_argument("--prune", action="store_true", help="remove what is not current, after a question")
    for each in commands.choices.values():
        each.add_argument("--debug", action="store_true", help="show where an error came from")
    options = parser.parse_args(arguments)
    with contextlib.suppress(ValueError):  # not in the main thread, as in some tests
        for number in (signal.SIGINT, signal.SIGTERM):  # also where the shell has made this process deaf to Ctrl-C
            signal.signal(number, signal.default_int_handler)
    rank = int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0  # torchrun's number of this process
    try:
        with contextlib.redirect_stdout(io.StringIO()) if rank > 0 else contextlib.nullcontext():
            from pdpo import commands  # torch and what else takes seconds to import: not for --help

            return getattr(commands, options.command.replace("-", "_"))(options)
    except (Exception, KeyboardInterrupt) as error:
        if "pdpo.commands" in sys.modules:  # else nothing has been started
            from pdpo.device import end_children

            end_children()
        if isinstance(error, KeyboardInterrupt):
            print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
            return 130
        from pdpo.files import disk_trouble

        text = str(error) if isinstance(error, ValueError) else disk_trouble(error)
        if options.debug or not text:
            raise
        if rank > 0:
            time.sleep(30)  # where process 0 says the same, torchrun meanwhile ends this one
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2


def _training() -> argparse.ArgumentParser:
    """The options of all commands that train."""
    train = argparse.ArgumentParser(add_help=False)
    train.add_argument("--data", help=".json or .jsonl with prompt, chosen, rejected [chosen_score, rejected_score], or a name")
    train.add_argument("--preset", choices=PRESETS, help="default: gpt2-medium on a GPU, else small")
    train.add_argument("--model", help="a folder or hub name of a causal language model; default: the preset's")
    train.add_argument("--context", type=int, help="longest sequence in tokens; default: the preset's")
    train.add_argument("--tokenizer", help="a folder or hub name; default: the model's, or a BPE trained on the data")
    train.add_argument("--sft-steps", type=int, help="optimizer steps of SFT; default: the preset's")
    train.add_argument("--steps", type=int, help="optimizer steps of each preference run; default: the preset's")
    train.add_argument("--lr", type=float, help="peak learning rate of preference training; default: the preset's")
    return train


if __name__ == "__main__":
    sys.exit(main())
