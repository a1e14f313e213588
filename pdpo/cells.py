"""What a cell shows: of a result a small table and a curve, of work that goes on one line, which is gone when it ends."""

import os
import sys
import time
from collections.abc import Callable
from html import escape
from types import SimpleNamespace

import numpy as np


def card(title: str, facts: dict[str, str], curve: str = "") -> str:
    """HTML: the title, a row for each fact, and a `curve` beside them."""
    left = "style='text-align:left'"
    rows = "".join(f"<tr><th {left}>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items())
    table = f"<table><caption {left}><b>{escape(title)}</b></caption>{rows}</table>"
    return f"<div style='display:flex;align-items:center;gap:2em'>{table}{curve}</div>"


def curve(x: list[float], y: list[float], *, label: str, width: int = 220, height: int = 80) -> str:
    """SVG: a line through the points (x ascending), under it what it is and from where to where y went; "" for fewer than two.

    Args: width, height: in pixels, of the line's box."""
    if len(x) < 2:
        return ""
    (x, y), span = (np.asarray(each, dtype=float) for each in (x, y)), (width - 8, height - 8)
    across, up = ((each - each.min()) / max(np.ptp(each), 1e-12) for each in (x, y))
    points = " ".join(f"{4 + a * span[0]:.1f},{4 + (1 - u) * span[1]:.1f}" for a, u in zip(across, up, strict=True))
    text = escape(f"{label}: {y[0]:.3g} to {y[-1]:.3g}")
    return (
        f"<svg width='{width}' height='{height + 18}' role='img' aria-label='{text}'>"
        f"<polyline points='{points}' fill='none' stroke='currentColor' stroke-width='1.5'/>"
        f"<text x='4' y='{height + 13}' font-size='11' fill='currentColor'>{text}</text></svg>"
    )


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, with a cell to show things in (that ipykernel is imported is not enough)."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def progress_file() -> SimpleNamespace:
    """What tqdm draws on, as its `file`: in a notebook a line under the cell, in a terminal stderr, else lines for a log.

    On stderr a notebook would show the line red, and keep a red line when it is gone. Where $PDPO_STATIC says that nobody looks,
    a notebook draws none."""
    if not in_notebook():
        return sys.stderr if sys.stderr.isatty() else SimpleNamespace(write=log_lines(), flush=int, encoding="utf-8")
    write = str if os.environ.get("PDPO_STATIC") else cell_line
    return SimpleNamespace(write=write, flush=int, encoding="utf-8")  # nothing is held back; blocks may be drawn


_lines: dict = {}  # of the cell that runs: its number, and the handle of its line


def cell_line(text: str) -> None:
    """Shows a text on the cell's one line, over what stood there; blanks, with which tqdm ends, leave nothing."""
    from IPython import get_ipython
    from IPython.display import display

    text, cell = text.strip("\r\n "), getattr(get_ipython(), "execution_count", 0)
    shown = {"text/plain": text, "text/html": text and f"<pre style='margin:0'>{escape(text)}</pre>"}
    if cell in _lines:
        _lines[cell].update(shown, raw=True)
    elif text:
        _lines.clear()
        _lines[cell] = display(shown, raw=True, display_id=True)


def log_lines(seconds: float = 60.0) -> Callable[[str], None]:
    """A function that writes a text to stderr as a line of its own, at most one in so many seconds: a log is not drawn over."""
    due = [time.monotonic() + seconds]

    def show(text: str) -> None:
        if text.strip() and time.monotonic() >= due[0]:
            due[0] = time.monotonic() + seconds
            print(text.strip("\r\n "), file=sys.stderr, flush=True)

    return show
