"""One line that says how far a pass over data is and how long the rest will take; it is gone when the pass ends."""

import shutil
import threading
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from pdpo.cells import in_notebook, progress_file
from pdpo.distributed import launch_rank

DELAY = 2.0  # seconds that a pass takes before anything is drawn


def progress(
    items: Iterable, description: str, *, total: int | None = None, done: int = 0, hidden: bool = False, later: float | None = None
) -> Iterator:  # fmt: skip
    """The items, one by one; a pass within a pass takes the line for as long as it lasts.

    Processes that torchrun started beside the first one draw nothing. What stands in a call of this function beside the items
    is not in a stage's key (`reach`).

    Args: total: of the items, with those `done` before, for example by a killed run; None counts them. hidden: draws nothing.
          later: seconds of other work that will come between the items. Where it is given and the whole will take more than a
              minute, a line says how long, measured on the first item that takes ten seconds, or on the second; in a notebook
              the bar alone does."""
    total = done + len(items) if total is None else total
    if hidden or total < 2 or launch_rank() > 0:
        yield from items
        return
    columns = min(shutil.get_terminal_size().columns, 100)  # all of one width: each covers what the one before has left
    look = {"leave": False, "position": 0, "ncols": columns, "nrows": 25, "file": progress_file()}
    bar = tqdm(items, description, initial=done, total=total, mininterval=1.0, delay=DELAY, **look)

    def draw() -> None:  # also while the first item takes its time
        bar.delay = 0
        bar.refresh()

    timer = threading.Timer(DELAY, draw)
    timer.daemon = True
    timer.start()
    silent, began = later is None or in_notebook(), time.monotonic()
    try:
        for number, item in enumerate(bar, 1):
            yield item
            seconds, began = time.monotonic() - began, time.monotonic()
            if not silent and (number == 2 or seconds > 10):
                silent, minutes = True, ((total - done - number) * seconds + later) / 60
                if minutes > 1.5:
                    bar.write(f"{description}: about {minutes:.0f} minutes on this machine")
    finally:
        timer.cancel()
        bar.close()
