"""What it costs that nothing damaged is read: `python benchmarks/digests.py`. Medians of five, files in the system's cache.

The stages of `tiny` that are kept in runs/ are checked as every read of them does; a file of 1.4 GB, the weights of
GPT-2-medium in float32, stands for what is checked once a process.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pdpo import stages
from pdpo.files import file_sha256


def median_seconds(work: Callable) -> float:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    kept = sorted(path.parent for path in (stages.runs_dir() / "tiny").glob("*/stage.json"))
    if not kept:
        raise SystemExit(
            f"{stages.runs_dir()}: expected stages of tiny, got none. Run python -m pdpo run --notebooks 00 first."
        )
    milliseconds = [1000 * median_seconds(lambda: stages.damage(path)) for path in kept]  # noqa: B023
    print(f"tiny, {len(kept)} stages: median {statistics.median(milliseconds):.1f} ms each, at most {max(milliseconds):.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.safetensors"
        with open(weights, "wb") as file:
            for _ in range(1400):
                file.write(os.urandom(10**6))
        print(f"1.4 GB of weights: {median_seconds(lambda: file_sha256(weights)):.2f} s, once a process")


if __name__ == "__main__":
    main()
