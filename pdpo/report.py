"""report.html, one file with all that `train` says."""

import base64
import html
import itertools
from dataclasses import asdict

from pdpo import plots
from pdpo.results import Evaluation, run_info
from pdpo.summary import note, side_by_side, table, warnings

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #8886; white-space: pre-wrap }}
img {{ max-width: 100%; background: white }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def report(measured: list[Evaluation], data: dict, num_held_out: int) -> str:
    """A page that needs no other file and no network: table, warnings, three prompts, curves, data report and settings.

    Args: measured, num_held_out: as for `summary.summary`.
          data: what `data.data_report` found."""
    runs = [each.run for each in measured]
    title = " and ".join(run.heading for run in runs[1:] or runs)
    figures = [plots.sft_curves(runs[:1], title="SFT: loss of training batches and of held-out prompts")]
    figures += [plots.training_curves([run], title=f"{run.heading}: held-out loss, and KL from SFT") for run in runs[1:]]
    images = (base64.b64encode(plots.png(figure)).decode() for figure, _ in figures)
    info = run_info(runs[0].preset, [*runs, *measured])
    settings, prompts = [asdict(run.train) for run in runs], side_by_side(measured)
    keys = dict.fromkeys(itertools.chain.from_iterable(settings))
    of_method = [["", *(run.method for run in runs)], *([key, *(each.get(key, "") for each in settings)] for key in keys)]
    parts = {
        "What came of it": _table(table(measured)) + _paragraphs([note(measured, num_held_out)]),
        "What to know before believing it": _paragraphs(warnings(measured) or ["Nothing that the program looks for."]),
        "Three test prompts": _table([prompts[0], *(each.values() for each in prompts)]),
        "Curves": "".join(f'<p><img alt="curves" src="data:image/png;base64,{image}"></p>' for image in images),
        "Data": _table([["", "in the file"], *data.items()]),
        "Settings": _table(of_method),
        "Made with": _table([["", ""], *info.items()]),
    }
    body = "\n".join(f"<h2>{heading}</h2>\n{content}" for heading, content in parts.items())
    return PAGE.format(title=html.escape(title), body=body)


def _paragraphs(texts: list[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _table(rows) -> str:
    """An HTML table of these cells, the first row its head."""
    tags = itertools.chain(["th"], itertools.repeat("td"))
    lines = ("".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) for tag, row in zip(tags, rows, strict=False))
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"
