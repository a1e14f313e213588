"""What each command of `python -m pdpo` does; `__main__` says with which options."""

import argparse
import contextlib
import itertools
import shlex
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import joblib

from pdpo import data, experiments, sampling
from pdpo.device import device
from pdpo.distributed import is_leader, launched, process_group, world_size
from pdpo.encoding import chat_template
from pdpo.files import check_new_folder, check_writable, read_json, replacing, write_csv
from pdpo.models import load_policy, load_tokenizer
from pdpo.presets import ONLINE, Preset, betas_of, get_preset
from pdpo.saved import copy_run
from pdpo.stages import runs_dir
from pdpo.statistics import with_interval
from pdpo.summary import aligned, in_brackets, summary


def run(options: argparse.Namespace) -> int:
    from pdpo.runner import run_notebooks  # needs nbclient, which training does not

    preset = experiments.start(options.preset)
    return 0 if run_notebooks(preset, options.notebooks, jobs=options.jobs, save=options.save) else 1


def runs(options: argparse.Namespace) -> int:
    from pdpo.kept import print_kept

    print_kept(options.prune)
    return 0


def _preset(options: argparse.Namespace) -> Preset:
    """The preset that the options of `_training` ask for."""
    preset = get_preset(options.preset or ("gpt2-medium" if device().type == "cuda" else "small"))
    given = {key: value for key, value in vars(options).items() if value is not None}
    sft = replace(preset.sft, **({"steps": options.sft_steps} if "sft_steps" in given else {}))
    preference = replace(preset.preference, **{key: given[key] for key in ("steps", "lr", "alpha") if key in given})
    online = replace(preset.online, **{key: given[key] for key in ("steps", "lr") if key in given})
    sources = {key: given[key] for key in ("data", "model", "tokenizer", "context") if key in given}
    return replace(preset, sft=sft, preference=preference, online=online, **sources)


def _start(preset: Preset, methods: list[str], betas: list[float], seeds: list[int]) -> list[data.Preference]:
    """The preset's records; bad input is refused before anything is trained."""
    records = data.load_preferences(preset.data)
    for method, seed in itertools.product(methods, seeds):
        for beta in betas_of(method, betas):
            replace(preset.online if method in ONLINE else preset.preference, method=method, beta=beta, seed=seed)
    if world_size() > 1 and set(methods) & set(ONLINE):
        raise ValueError(f"train: expected one process for ppo and rloo, got {world_size()}. Leave torchrun out.")
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
def train(options: argparse.Namespace) -> int:
    if options.out is not None:
        check_new_folder(options.out)
    if options.log and find_spec("tensorboard") is None:
        raise ValueError("train: --log tensorboard needs a package that is not installed. Install it: pip install tensorboard.")
    judge = None
    if options.judge_url:
        from pdpo.llm_judge import LLMJudge  # before anything is trained: it may miss its package

        cache = runs_dir() / "judge" / "llm.jsonl"
        judge = LLMJudge(options.judge_url, options.judge_model, task=options.judge_task, cache=cache)
    preset = _preset(options)
    if options.reward == "toy-gold" and preset.data != "toy":
        raise ValueError(f"train: --reward toy-gold expected --data toy, whose answers it can score, got {preset.data}.")
    records = _start(preset, options.method, [options.beta], [options.seed])
    sft = experiments.run_sft(preset, seed=options.seed)
    report = data.data_report(records, sft.load_tokenizer())
    del report["leaked_prompts"]  # of a whole file nothing is held out
    print("data: " + ", ".join(f"{key} {value}" for key, value in report.items()))
    evaluations = []
    for method in dict.fromkeys(["sft", *options.method]):
        (beta,) = betas_of(method, [options.beta])
        reward = {"reward": options.reward} if method in ONLINE else {}
        run = sft if method == "sft" else experiments.run_preference(sft, method=method, beta=beta, **reward)
        before, *_, after = [row for row in run.history if "eval_loss" in row]
        numbers = [f"{key[5:]} {before[key]:.3f} -> {after[key]:.3f}" for key in before if key.startswith("eval_")]
        print(f"{method}: held out, before -> after: {', '.join(numbers)}")
        if options.log:
            _tensorboard(run)
        evaluations.append(experiments.run_win_rate(run))
        if options.out is not None and method in options.method and is_leader():
            target = options.out if len(options.method) == 1 else options.out / method
            print(f"{method}: saved in {copy_run(run, target)}")
    num_held_out = len(data.load_split(preset.data)[1])
    print(f"\n{summary(evaluations, num_held_out)}")
    if judge and is_leader():
        _ask(judge, evaluations)
    if options.out is not None and is_leader():
        from pdpo.report import report as page  # matplotlib, which training does not need

        with replacing(options.out / "report.html") as temporary:
            temporary.write_text(page(evaluations, report, num_held_out), encoding="utf-8")
        print(f"\nall of this, the curves and the settings: {options.out / 'report.html'}")
    return 0


def _ask(judge, evaluations: list[experiments.Evaluation]) -> None:
    """Prints what an `LLMJudge` says of them."""
    print(f"\n{judge.model}, each answer's first sample against the best response that was given:")
    for each in evaluations:
        rows = each.rows[:: each.num_samples]
        found = judge.compare(*([row[key] for row in rows] for key in ("prompt", "text", "chosen")))
        print(
            f"{each.run.method:12} wins {in_brackets(found.wins)}; of what it decided it named the first in {found.first:.2f}; "
            f"{found.unreadable} of {2 * len(rows)} answers unreadable; {found.num_tokens} tokens"
        )


def _tensorboard(run: experiments.Run) -> None:
    """Writes a run's history as TensorBoard's scalars, once."""
    from torch.utils.tensorboard import SummaryWriter

    folder = runs_dir() / "tensorboard" / run.path.name
    if is_leader() and not folder.exists():
        with SummaryWriter(str(folder)) as writer:
            for row in run.history:
                for key, value in row.items():
                    name = f"held_out/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
                    writer.add_scalar(name, value, row["step"])
        print(f"{run.method}: tensorboard --logdir {folder.parent}")


def sweep(options: argparse.Namespace) -> int:
    if launched():
        instead = "`python -m pdpo sweep` gives each GPU of this machine runs of its own; for other machines, see --scheduler."
        raise ValueError(f"sweep: expected to be started without torchrun, which is for one policy on several GPUs. {instead}")
    if options.out is not None:
        frontier = options.out.with_name(f"{options.out.stem}_frontier").absolute()
        for path in (options.out, *(frontier.with_name(f"{frontier.name}.{suffix}") for suffix in ("png", "csv"))):
            if path.exists():
                raise ValueError(f"{path}: expected a new file, got one that exists. Choose another name.")
        check_writable(options.out)
    preset = _preset(options)
    betas, seeds = dict.fromkeys(options.beta or preset.betas), dict.fromkeys(options.seeds)
    _start(preset, options.method, betas, seeds)
    with _cluster(options.scheduler):
        sfts = experiments.run_all(experiments.run_sft, [{"preset": preset, "seed": seed} for seed in seeds])
        methods = dict.fromkeys(options.method)
        wanted = [(sft, method, beta) for sft in sfts for method in methods for beta in betas_of(method, betas)]
        settings = [{"sft": sft, "method": method, "beta": beta} for sft, method, beta in wanted if method != "sft"]
        made = iter(experiments.run_all(experiments.run_preference, settings))
        runs = [sft if method == "sft" else next(made) for sft, method, _ in wanted]
        measured = experiments.run_all(experiments.run_win_rate, [{"run": run} for run in runs])
    of_method = {method: [each for each in measured if each.run.method == method] for method in methods}
    rows = [_measurements(evaluation) for each in of_method.values() for evaluation in each]
    cells = [[f"{row[key]:.3f}" if type(row[key]) is float and key != "beta" else f"{row[key]}" for key in row] for row in rows]
    for i, line in enumerate(aligned([list(rows[0]), *cells], str.rjust)):
        if i > 1 and rows[i - 1]["method"] != rows[i - 2]["method"]:
            print()  # an eval_loss says something beside those of its own method
        print(line)
    score = ", score" * ("score" in rows[0])
    print(f"eval_loss: nats, each method's in a unit of its own. kl, win{score}: of n test prompts.")
    if options.out is not None:
        from pdpo import plots, statistics

        write_csv(options.out, rows)
        frontiers = {
            name.upper(): experiments.frontier_of(betas_of(name, betas), stages, num_seeds=len(seeds))
            for name, stages in of_method.items()
        }
        ylabel = "gold score (1 to 10)" if score else "SBERT win rate"
        title = f"What each method reaches at which KL ({preset.name})"
        figure, points = plots.frontier_curves(statistics.frontier_rows(frontiers), ylabel=ylabel, title=title)
        png = plots.save_figure(figure, frontier, points, info=experiments.run_info(preset, measured))
        print(f"saved in {options.out}; the frontier in {png}")
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
    run, wins, means = evaluation.run, evaluation.column("win"), evaluation.means
    row = {"method": run.method, "beta": "" if run.beta is None else run.beta, "seed": run.seed, "n": len(wins)}
    row |= {"eval_loss": run.history[-1]["eval_loss"], "kl": means["kl"]} | with_interval("win", wins)
    return row | ({"score": means["score"]} if "score" in means else {})


def sample(options: argparse.Namespace) -> int:
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
            length = min(options.max_new_tokens, tokenizer.model_max_length // 2)
            noise = {"temperature": options.temperature, "seed": options.seed, "num_samples": options.samples}
            found = sampling.sample(policy, tokenizer, [prompt], max_new_tokens=length, **noise)
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
        way_out = "Train it with `python -m pdpo train`; other models are asked through transformers."
        raise ValueError(f"{folder}: expected a policy with this kit's chat template, got another or none. {way_out}")
    return load_policy(preset).to(device()), tokenizer


def export_trl(options: argparse.Namespace) -> int:
    from pdpo.export import export_trl

    preset = experiments.start(_preset(options))
    target = export_trl(preset, options.target, beta=options.beta, method=options.method, seed=options.seed)
    print(f"{preset.preference.steps} steps of {preset.preference.batch_size} pairs, for TRL; go on with:")
    print(f"  cd {shlex.quote(str(target))} && trl dpo --config dpo.yaml")
    return 0


def grade(options: argparse.Namespace) -> int:
    from pdpo.grading import Limits, grade

    limits = Limits(seconds=options.seconds, megabytes=options.megabytes, user=options.user)
    grade(options.folder, options.out, jobs=options.jobs, seed=options.seed, limits=limits)
    return 0
