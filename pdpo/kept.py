"""What lies in runs/: each stage, how large and old it is, and whether the code and libraries of today would take it."""

import time
from pathlib import Path

from pdpo.files import read_json, remove, shown
from pdpo.reach import code_version_of
from pdpo.stages import damage, library_versions, runs_dir


def kept_stages() -> list[dict]:
    """One dict a folder of runs/: stage (its path there), bytes, days since it was made, why_not ("" where it is current)."""
    apart = ("judge", "notebooks", "figures", "tensorboard")
    return [
        {
            "stage": str(path.relative_to(runs_dir())),
            "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            "days": (time.time() - path.stat().st_mtime) / 86400,
            "why_not": _why_not(path),
        }
        for path in sorted(runs_dir().glob("*/*"))
        if path.is_dir() and path.parent.name not in apart
    ]


def _why_not(path: Path) -> str:
    """Why a call of today would not take this stage, or ""."""
    if path.suffix == ".partial":
        return "unfinished: the same call goes on with it"
    if path.suffix.startswith(".damaged"):
        return "damaged, and set aside"
    if reason := damage(path):
        return reason
    record = read_json(path / "stage.json")
    config, now = record["config"], library_versions()
    if other := [name for name, version in config["libraries"].items() if version != now.get(name)]:
        return "made with " + "; ".join(f"{name} {config['libraries'][name]}, now {now.get(name)}" for name in other)
    if code_version_of(record["built_by"]) != config["code"]:
        return "made by other code"
    parents = [config[key] for key in ("sft", "run", "reward_model") if config.get(key)]
    outdated = [name for name in parents if not (path.parent / name).is_dir() or _why_not(path.parent / name)]
    return f"its parent {outdated[0]} is gone or not current" if outdated else ""


def print_kept(prune: bool, answer=input) -> None:
    """Prints a line a stage; to prune, asks once and then removes what is not current (what is unfinished stays)."""
    stages = kept_stages()
    for each in stages:
        age = f"{each['days']:.1f} days"
        print(f"{each['bytes'] / 1e6:9.1f} MB  {age:>11}  {each['stage']}  {each['why_not'] or 'current'}")
    old = [each for each in stages if each["why_not"] and not each["why_not"].startswith("unfinished")]
    print(f"{len(stages)} stages in {shown(runs_dir())}, {len(old)} of them not current")
    if prune and old:
        size = sum(each["bytes"] for each in old) / 1e6
        if answer(f"remove these {len(old)} ({size:.1f} MB)? [y/N] ").strip().lower() in ("y", "yes"):
            for each in old:
                remove(runs_dir() / each["stage"])
            print(f"{len(old)} removed")
