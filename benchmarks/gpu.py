"""What GPT-2-medium costs on one GPU: time, memory and exactness of every step, as one JSON file and one page of tables.

    python benchmarks/gpu.py --out results                      # on a GPU: at most 8 minutes
    python benchmarks/gpu.py --out results --data-dir DATA --tokenizer-dir VOCABULARY
    python benchmarks/gpu.py --dry-run --out results            # every part at a tiny size on the CPU: under a minute

No network, no pretrained weights: GPT-2-medium's architecture with random ones. DATA holds the file of `instructions`,
VOCABULARY GPT-2's vocab.json and merges.txt; without both, rows of the same lengths are made up. Besides torch and
transformers nothing is needed; trl adds its rows where it is installed, and the page says where it is not.

Each part is a process of its own with a time limit of its own: a part that raises, hangs or is killed costs its own rows.
The files are written anew after each part. The exit status is 0 where every part ended well. `preference_step.py` and
`win_rate.py` do less, more carefully: they interleave rounds.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gpu_parts
import torch
from gpu_work import PRESET, PRESETS, Work, brief, on_cuda

# A T4 by its data sheet: half and float32 FLOP/s, bytes/s. The calculation takes half of the first two, three quarters of the last.
T4 = {"float16": 0.5 * 65e12, "float32": 0.5 * 8.1e12, "bytes": 0.75 * 320e9}
T4_HOST = 2.0  # its host, Colab's, is taken to be this much slower than the one here
# memory traffic of a step: AdamW 28, norm and clipping 12, casts to half and back 12, products 6, unscaling 8
BYTES_A_WEIGHT = 66


class Part(NamedTuple):
    run: Callable[[Work], Iterator[dict]]
    seconds: float  # its time limit


# in the order of what is wanted most, should the time run out
PARTS = {
    "setup": Part(gpu_parts.setup, 60),
    "preference": Part(gpu_parts.preference, 110),
    "agreement": Part(gpu_parts.agreement, 30),
    "training": Part(gpu_parts.training, 40),
    "memory": Part(gpu_parts.memory, 45),
    "sft": Part(gpu_parts.sft, 25),
    "sweep": Part(gpu_parts.sweep, 130),
    "sampling": Part(gpu_parts.sampling, 40),
    "checkpoint": Part(gpu_parts.checkpoint, 80),
    "trl": Part(gpu_parts.trl, 100),
    "one_process": Part(gpu_parts.one_process, 40),
    "trees": Part(gpu_parts.trees, 90),
}
MINUTES, DRY_SECONDS = 7.5, 200.0  # of all parts; of each in a dry run, on however slow a machine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="a folder for gpu.json and gpu.md; default: runs/gpu"
    )
    parser.add_argument("--dry-run", action="store_true", help="every part at a tiny size on the CPU")
    parser.add_argument("--data-dir", default=os.environ.get("PDPO_DATA_DIR"), help="default: $PDPO_DATA_DIR")
    parser.add_argument("--tokenizer-dir", help="a folder with GPT-2's vocab.json and merges.txt")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; setup always runs")
    parser.add_argument(
        "--start-method", choices=["fork", "spawn"], help="of processes; default: fork, if that can use the GPU"
    )
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run runs every part on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    began, results = time.monotonic(), {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        method = options.start_method or start_method()
        work = Work(Path(folder), options.dry_run, method, options.data_dir, options.tokenizer_dir)
        for name in [name for name in PARTS if name == "setup" or not options.parts or name in options.parts]:
            left = began + 60 * MINUTES - time.monotonic()
            result = results[name] = run_part(name, work, DRY_SECONDS if work.dry else min(PARTS[name].seconds, left))
            report = {"dry run": work.dry, "parts": results, "full preset": full_preset(results)}
            write(options.out / "gpu.json", json.dumps(report, indent=1))
            page = markdown(report)
            write(options.out / "gpu.md", page)
            print(f"{name}: {result['status']}, {len(result['rows'])} rows, {result['s']:.0f} s", flush=True)
    print(f"\n{page}\n\nThese tables and all numbers: {options.out}/gpu.md, gpu.json")
    ended_well = [part["status"] == "done" and not any("failed" in row for row in part["rows"]) for part in results.values()]
    return 0 if all(ended_well) else 1


def start_method() -> str:
    """fork, which spares each part the imports; spawn where an import has woken CUDA, which a forked process then cannot use."""
    if not torch.cuda.is_available():
        return "fork"
    probe = multiprocessing.get_context("fork").Process(target=torch.zeros, args=(1,), kwargs={"device": "cuda"})
    probe.start()
    probe.join(60)
    probe.kill()
    return "fork" if probe.exitcode == 0 else "spawn"


def run_part(name: str, work: Work, limit: float) -> dict:
    """Runs a part in a process group of its own, for `limit` seconds at most: how it ended, seconds, and the rows it left."""
    if limit < 1:
        return {"status": f"not begun: the {MINUTES:g} minutes were over", "s": 0.0, "rows": []}
    process = multiprocessing.get_context(work.start_method).Process(target=in_own_group, args=(name, work))
    began = time.monotonic()
    process.start()
    process.join(limit)
    over = process.is_alive()
    with contextlib.suppress(ProcessLookupError):  # all that it has started
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    failure = work.folder / f"{name}.failed"
    status = "done"
    if over:
        status = f"stopped at its limit of {limit:.0f} s"
    elif process.exitcode < 0:
        status = f"killed by {signal.Signals(-process.exitcode).name}"
    elif process.exitcode > 0:
        status = failure.read_text() if failure.exists() else f"ended with status {process.exitcode}"
    result = {"status": status, "s": time.monotonic() - began, "rows": work.rows(name)}
    log = work.folder / f"{name}.log"
    return result if status == "done" or not log.exists() else result | {"log": log.read_text(errors="replace")[-3000:]}


def in_own_group(name: str, work: Work) -> None:
    """What a part's process runs; each row is on the disk before the next is measured."""
    os.setsid()
    with open(work.folder / f"{name}.log", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if not on_cuda():
        torch.set_num_threads(1)
    try:
        with open(work.folder / f"{name}.jsonl", "w", buffering=1) as file:
            for row in PARTS[name].run(work):
                file.write(json.dumps(row) + "\n")
    except BaseException as error:
        (work.folder / f"{name}.failed").write_text(brief(error))
        raise


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


# ---- the report


def full_preset(results: dict) -> list[dict]:
    """Minutes of 06 to 08 with the whole preset, here and, by calculation, on a T4; README.md states the formula."""
    try:
        return _full_preset({name: part["rows"] for name, part in results.items()})
    except Exception as error:  # whichever row is missing or has failed
        return [{"note": f"not calculated: it needs rows that are missing ({brief(error)})"}]


def _full_preset(rows: dict[str, list[dict]]) -> list[dict]:
    preset, facts = PRESETS[PRESET], {row["what"]: row["value"] for row in rows["setup"]}
    fast = [row for row in rows["preference"] if row["path"] == "fast" and row["template"] == "pdpo" and "failed" not in row]
    of_sft = {row["precision"]: row for row in rows["sft"] if row["path"] == "fast" and "failed" not in row}
    small = min(abs(row["pairs"] - preset.preference.batch_size) for row in fast)
    of_pairs = {row["precision"]: row for row in fast if abs(row["pairs"] - preset.preference.batch_size) == small}
    largest = {row["precision"]: row for row in fast if row["pairs"] == max(row["pairs"] for row in fast)}
    share = {key: row["FLOP"] / row["s/step"] / facts[f"FLOP/s of a matrix product, {key}"] for key, row in largest.items()}

    def t4_step(row: dict) -> float:
        products = (row["FLOP"] - row["of them head"]) / (share["float16"] * T4["float16"])
        head = row["of them head"] / (share["float32"] * T4["float32"])
        return max(T4_HOST * row["s/step"], products + head + BYTES_A_WEIGHT * facts["weights"] / T4["bytes"])

    stages = {(row["stage"].rsplit("-", 1)[0], row["steps"]): row["s"] for row in rows["sweep"] if "steps" in row}

    def fixed_and_measurement(name: str, step: float) -> tuple[float, float]:
        """A stage of k steps has k + 1 measurements: s(k) = fixed + k step + (k + 1) measurement."""
        slope = (stages[name, 4] - stages[name, 2]) / 2
        measurement = max(slope - step, 0.0)
        return max(stages[name, 2] - 2 * slope - measurement, 0.0), measurement

    num_runs, num_win_rates = 2 * len(preset.betas), 3 * len(preset.temperatures) + 2 * (len(preset.betas) - 1)
    win_rate = statistics.median(seconds for (name, _), seconds in stages.items() if name.startswith("win_rate"))
    reward = next(seconds for (name, _), seconds in stages.items() if name.startswith("reward_model"))
    passes = 2 * facts["training pairs"] / preset.preference.batch_size / 3  # reference and reward model: forward alone
    answer = []
    for where, host, sft_step, step in (
        ("here", 1.0, of_sft[facts["precision"]]["s/step"], of_pairs[facts["precision"]]["s/step"]),
        ("T4, calculated", T4_HOST, t4_step(of_sft["float16"]), t4_step(of_pairs["float16"])),
    ):
        seconds = {}
        for name, count, steps, each in (
            ("sft", 1, preset.sft.steps, sft_step),
            ("preference", num_runs, preset.preference.steps, step),
        ):
            of_stage, here = ("sft", of_sft) if name == "sft" else ("dpo-beta0.1", of_pairs)
            fixed, measurement = fixed_and_measurement(of_stage, here[facts["precision"]]["s/step"])
            seconds[name] = count * (host * (fixed + (preset.preference.num_evaluations + 1) * measurement) + steps * each)
        seconds["win rates and reward model"] = host * (num_win_rates * win_rate + reward) + passes * step
        answer.append(
            {"where": where, "s an SFT step": sft_step, "s a preference step": step}
            | {f"{name}, minutes": value / 60 for name, value in seconds.items()}
            | {"all, minutes": sum(seconds.values()) / 60}
        )
    return answer


def steps_table(preference: list[dict], trl: list[dict], facts: dict) -> list[dict]:
    """One row for each template, batch and precision: s a step (peak GiB) of each path, and how many times as fast the fast one is."""
    by_key = {(row["template"], row["pairs"], row["precision"], row["path"]): row for row in preference + trl if "path" in row}
    table = []
    for template, pairs, precision in dict.fromkeys(key[:3] for key in by_key):
        columns = {path: by_key.get((template, pairs, precision, path)) for path in ("plain", "fast", "TRL tuned")}
        columns["TRL as shipped"] = by_key.get((template, pairs, "bfloat16", "TRL as shipped"))
        line, fast = {"template": template, "pairs": pairs, "precision": precision}, columns["fast"] or {}
        for path, row in columns.items():
            peak = f" ({row['GiB']:.3g})" if row and row.get("GiB") else ""
            line[path] = f"{row['s/step']:.3g}{peak}" if row and "s/step" in row else row and (row.get("failed") or row["note"])
        for path, row in columns.items():
            if path != "fast" and row:
                both = "s/step" in row and "s/step" in fast
                line[f"fast against {path}"] = f"{row['s/step'] / fast['s/step']:.2f}" if both else None
        rate = facts.get(f"FLOP/s of a matrix product, {precision}")
        line["share of the matrix rate"] = f"{fast['FLOP'] / fast['s/step'] / rate:.2f}" if rate and "s/step" in fast else None
        exact = by_key.get((template, pairs, "float32", "plain"), {}).get("losses")
        if exact and "losses" in fast:
            line["losses differ by"] = max(abs(a - b) for a, b in zip(fast["losses"], exact, strict=True))
        table.append(line)
    return table


def markdown(report: dict) -> str:
    """The page; a table that cannot be made of the rows there are costs itself alone."""
    parts = report["parts"]
    lines = ["## On a GPU" + (" (a dry run on the CPU: these numbers mean nothing)" if report["dry run"] else ""), ""]
    lines += [f"{name}: {part['status']}, {part['s']:.0f} s  " for name, part in parts.items()]
    for name, part in parts.items():
        rows = part["rows"]
        try:
            if name == "preference":
                facts = {row["what"]: row["value"] for row in parts.get("setup", {"rows": []})["rows"]}
                rows = steps_table(rows, parts.get("trl", {"rows": []})["rows"], facts)
            elif name == "trl" and "preference" in parts and any("path" in row for row in rows):
                continue  # in the table of `preference`
            lines += ["", f"### {PARTS[name].run.__doc__.strip()}", "", *table_of(rows)] if rows else []
        except Exception as error:
            lines += ["", f"{name}: no table ({brief(error)}); its rows are in gpu.json"]
    lines += ["", "### How many minutes do 06 to 08 take with the whole preset?", "", *table_of(report["full preset"])]
    return "\n".join(lines)


def table_of(rows: list[dict]) -> list[str]:
    """Rows as Markdown, a column for each key that any of them has."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("losses", "FLOP", "of them head")]
    keys = [key for key in keys if any(row.get(key) is not None for row in rows)]

    def shown(value) -> str:
        if value is None:
            return ""
        return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")

    return [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)] + [
        f"| {' | '.join(shown(row.get(key)) for key in keys)} |" for row in rows
    ]


if __name__ == "__main__":
    raise SystemExit(main())
