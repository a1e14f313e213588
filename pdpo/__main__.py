"""run executes the notebooks; train and sweep train on a preference file; sample asks a policy; export-trl hands over to TRL."""

import argparse
import contextlib
import io
import itertools
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import joblib

from pdpo import data, experiments
from pdpo.device import device, end_children
from pdpo.distributed import is_leader, launch_rank, launched, process_group
from pdpo.encoding import chat_template
from pdpo.files import check_new_folder, check_writable, disk_trouble, read_json, replacing, write_csv
from pdpo.models import load_policy, load_tokenizer
from pdpo.presets import METHODS, PRESETS, Preset, betas_of, get_preset
from pdpo.sampling import sample
from pdpo.stages import runs_dir
from pdpo.statistics import with_interval
from pdpo.summary import summary

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
    sweep.add_argument(
        "--scheduler", metavar="ADDRESS", help="of a Dask cluster that makes the runs; default: this machine does"
    )
    export = commands.add_parser("export-trl", help="SFT, then a folder from which `trl dpo` goes on", parents=[_training()])
    export.add_argument("target", type=Path, metavar="DIR", help="a new folder")
    export.add_argument("--method", choices=METHODS, default="dpo", help="dpo, the one that TRL's DPOTrainer can do as we do")
    export.add_argument("--beta", type=float, default=0.1, help=f"{BETA}; default: 0.1")
    export.add_argument("--seed", type=int, default=0)
    ask = commands.add_parser("sample", help="what a trained policy answers")
    ask.add_argument("policy", type=Path, metavar="DIR", help="a folder that `train --out` wrote")
    ask.add_argument("prompt", nargs="*", help="prompts, each in quotes; default: the lines of standard input")
    ask.add_argument("--compare", type=Path, nargs="+", default=[], metavar="DIR", help="other folders, asked the same")
    ask.add_argument("--chat", action="store_true", help="ask one prompt after another; each is answered by itself")
    ask.add_argument(
        "--temperature", type=float, default=0.0, help="of the sampling; default: 0, the likeliest token each time"
    )
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
    command = {"run": _run, "train": _train, "sweep": _sweep, "export-trl": _export_trl}
    command = (command | {"sample": _sample, "runs": _runs, "grade": _grade})[options.command]
    with contextlib.suppress(ValueError):  # not in the main thread, as in some tests
        for number in (signal.SIGINT, signal.SIGTERM):  # also where the shell has made this process deaf to Ctrl-C
            signal.signal(number, signal.default_int_handler)
    try:
        with contextlib.redirect_stdout(io.StringIO()) if launch_rank() > 0 else contextlib.nullcontext():
            return command(options)
    except KeyboardInterrupt:
        end_children()
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        end_children()
        text = str(error) if isinstance(error, ValueError) else disk_trouble(error)
        if options.debug or not text:
            raise
        if launch_rank() > 0:
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


def _run(options: argparse.Namespace) -> int:
    from pdpo.runner import run_notebooks  # needs nbclient, which training does not

    preset = experiments.start(options.preset)
    return 0 if run_notebooks(preset, options.notebooks, jobs=options.jobs, save=options.save) else 1


def _runs(options: argparse.Namespace) -> int:
    from pdpo.kept import print_kept

    print_kept(options.prune)
    return 0


def _preset(options: argparse.Namespace) -> Preset:
    """The preset that the options of `_training` ask for."""
    preset = get_preset(options.preset or ("gpt2-medium" if device().type == "cuda" else "small"))
    given = {key: value for key, value in vars(options).items() if value is not None}
    sft = replace(preset.sft, **({"steps": options.sft_steps} if "sft_steps" in given else {}))
    preference = replace(preset.preference, **{key: given[key] for key in ("steps", "lr", "alpha") if key in given})
    sources = {key: given[key] for key in ("data", "model", "tokenizer", "context") if key in given}
    return replace(preset, sft=sft, preference=preference, **sources)


def _start(preset: Preset, methods: list[str], betas: list[float], seeds: list[int]) -> list[data.Preference]:
    """The preset's records; bad input is refused before anything is trained."""
    records = data.load_preferences(preset.data)
    for method, seed in itertools.product(methods, seeds):
        for beta in betas_of(method, betas):
            replace(preset.preference, method=method, beta=beta, seed=seed)
    check_writable(runs_dir() / preset.name, num_bytes=_num_bytes(preset, len(methods) * len(betas) * len(seeds) + len(seeds)))
    experiments.start(preset)
    parts = data.load_split(preset.data)
    if len({record.prompt for record in parts[2]}) < 2:
        raise ValueError(
            f"{preset.data}: expected rows enough for at least 2 prompts to test on, got {len(records)} rows, of which "
            f"{len(parts[2])} would be tested on. An interval needs two; a result that says something needs a hundred."
        )
    print("prompts of {} rows: {} to train on, {} to watch, {} to test".format(len(records), *map(len, parts)))
    return records


def _num_bytes(preset: Preset, num_runs: int) -> int:
    """About how much that many runs write: their weights, and of one of them two checkpoints of weights and Adam's numbers."""
    weights = 4 * (preset.embedding * (preset.vocab_size + preset.context) + 12 * preset.layers * preset.embedding**2)
    if preset.model is not None:  # a hub's is not known before it is there
        weights = sum(file.stat().st_size for file in Path(preset.model).glob("*.safetensors"))
    return weights * (num_runs + 6)


@process_group()
def _train(options: argparse.Namespace) -> int:
    if options.out is not None:
        check_new_folder(options.out)
    preset = _preset(options)
    records = _start(preset, options.method, [options.beta], [options.seed])
    sft = experiments.run_sft(preset, seed=options.seed)
    report = data.data_report(records, sft.load_tokenizer())
    del report["leaked_prompts"]  # of a whole file nothing is held out
    print("data: " + ", ".join(f"{key} {value}" for key, value in report.items()))
    evaluations = []
    for method in dict.fromkeys(["sft", *options.method]):
        (beta,) = betas_of(method, [options.beta])
        run = sft if method == "sft" else experiments.run_preference(sft, method=method, beta=beta)
        measured = [row for row in run.history if "eval_loss" in row]
        numbers = {key: (measured[0][key], measured[-1][key]) for key in measured[0] if key.startswith("eval_")}
        print(
            f"{method}: held out, before -> after: " + ", ".join(f"{k[5:]} {a:.3f} -> {b:.3f}" for k, (a, b) in numbers.items())
        )
        evaluations.append(experiments.run_win_rate(run))
        if options.out is not None and method in options.method and is_leader():
            target = options.out if len(options.method) == 1 else options.out / method
            print(f"{method}: saved in {experiments.copy_run(run, target)}")
    print(f"\n{summary(evaluations, num_held_out=len(data.load_split(preset.data)[1]))}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    if launched():
        raise ValueError(
            "sweep: expected to be started without torchrun, which is for one policy on several GPUs. `python -m pdpo sweep` gives "
            "each GPU of this machine runs of its own; for those of other machines, see --scheduler."
        )
    if options.out is not None:
        if options.out.exists():
            raise ValueError(f"{options.out}: expected a new file, got one that exists. Choose another name.")
        check_writable(options.out)
    preset = _preset(options)
    betas, seeds = dict.fromkeys(options.beta or preset.betas), dict.fromkeys(options.seeds)
    _start(preset, options.method, betas, seeds)
    with _cluster(options.scheduler):
        sfts = experiments.run_all(experiments.run_sft, [{"preset": preset, "seed": seed} for seed in seeds])
        methods = dict.fromkeys(options.method)
        wanted = [
            {"sft": sft, "method": method, "beta": beta}
            for sft in sfts
            for method in methods
            for beta in betas_of(method, betas)
        ]
        made = iter(experiments.run_all(experiments.run_preference, [each for each in wanted if each["method"] != "sft"]))
        runs = [each["sft"] if each["method"] == "sft" else next(made) for each in wanted]
        measured = experiments.run_all(experiments.run_win_rate, [{"run": run} for run in runs])
    rows = [_measurements(evaluation) for evaluation in measured]
    lines = [list(rows[0])] + [
        [f"{value:.3f}" if key not in ("method", "beta", "seed") else f"{value}" for key, value in row.items()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    if options.out is not None:
        with replacing(options.out) as temporary:
            write_csv(temporary, rows)
        print(f"saved in {options.out}")
    return 0


@contextlib.contextmanager
def _cluster(address: str | None):
    """Within it `run_all` sends its runs to the Dask scheduler at this address; without one, nothing changes."""
    if address is None:
        yield
        return
    try:
        from dask.distributed import Client

        client = Client(address, timeout="10s")
    except ImportError:
        raise ValueError('sweep: --scheduler needs Dask. Install it: pip install "distributed".') from None
    except (OSError, ValueError) as error:
        raise ValueError(f"sweep: no Dask scheduler answers at {address!r} ({error}). Is it running?") from None
    with client, joblib.parallel_config(backend="dask"):
        yield


def _measurements(evaluation: experiments.Evaluation) -> dict:
    """A line of the sweep's table: held-out loss in nats, KL in nats a response, shares of wins, and on `toy` the gold score."""
    run = evaluation.run
    score = {"score": float(evaluation.column("score").mean())} if "score" in evaluation.rows[0] else {}
    return {
        **{"method": run.method, "beta": "" if run.beta is None else run.beta, "seed": run.seed},
        **{"eval_loss": run.history[-1]["eval_loss"], "kl": float(evaluation.column("kl").mean())},
        **with_interval("win", evaluation.column("win")),
        **score,
    }


def _sample(options: argparse.Namespace) -> int:
    policies = {folder: _saved_policy(folder) for folder in [options.policy, *options.compare]}
    prompts = options.prompt
    if options.chat or not prompts:
        typed = sys.stdin.isatty()
        if typed:
            print("A line is a prompt, answered by itself: these policies know no earlier turns. Ctrl-D ends.")
        prompts = itertools.chain(prompts, map(str.rstrip, iter(lambda: _typed("> " if typed else ""), None)))
    for prompt in filter(None, prompts):
        if not options.chat:
            print(prompt)
        for folder, (policy, tokenizer) in policies.items():
            found = sample(
                policy, tokenizer, [prompt], temperature=options.temperature, seed=options.seed, num_samples=options.samples,
                max_new_tokens=min(options.max_new_tokens, tokenizer.model_max_length // 2),
            )  # fmt: skip
            name = f"{folder.name}: " if len(policies) > 1 else ""
            for each in found:
                print(f"  {name}{each.text}" + ("" if each.finished else " ..."))
    return 0


def _typed(question: str) -> str | None:
    """A line of standard input; None at its end."""
    try:
        return input(question)
    except EOFError:
        return None


def _saved_policy(folder: Path) -> tuple:
    """The policy that `train --out` saved in this folder, and its tokenizer."""
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder}: expected a folder that `train --out` wrote, got one without tokenizer_config.json.")
    context = read_json(folder / "tokenizer_config.json").get("model_max_length")
    preset = replace(get_preset("small"), model=str(folder), context=context)
    tokenizer = load_tokenizer(preset)
    if tokenizer.chat_template != chat_template(tokenizer):
        raise ValueError(
            f"{folder}: expected a policy with this kit's chat template, got another or none. Train it with `python -m pdpo train`; "
            "other models are asked through transformers."
        )
    return load_policy(preset).to(device()), tokenizer


def _export_trl(options: argparse.Namespace) -> int:
    from pdpo.export import export_trl

    preset = experiments.start(_preset(options))
    target = export_trl(preset, options.target, beta=options.beta, method=options.method, seed=options.seed)
    print(f"{preset.preference.steps} steps of {preset.preference.batch_size} pairs, for TRL; go on with:")
    print(f"  cd {shlex.quote(str(target))} && trl dpo --config dpo.yaml")
    return 0


def _grade(options: argparse.Namespace) -> int:
    from pdpo.grading import Limits, grade

    limits = Limits(seconds=options.seconds, megabytes=options.megabytes, user=options.user)
    grade(options.folder, options.out, jobs=options.jobs, seed=options.seed, limits=limits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
