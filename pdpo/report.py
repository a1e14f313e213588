"""report.html, one file with all that `train` says; and a trained policy's model card, in the model hub's format."""

import base64
import html
import itertools
import json
from dataclasses import asdict
from pathlib import Path

from pdpo import plots
from pdpo.encoding import TEMPLATE
from pdpo.files import read_json
from pdpo.results import Evaluation, Run, run_info
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

CARD = """---
{front_matter}
---

# {title}

Trained by pdpo's `python -m pdpo train`{start}. beta: KL strength; a larger beta keeps the policy closer to the reference.

```python
from transformers import pipeline

ask = pipeline("text-generation", model="...")  # this folder
print(ask([{{"role": "user", "content": "What is the capital of France?"}}], max_new_tokens=64)[0]["generated_text"][-1]["content"])
```

## Template

The tokenizer's chat template writes a prompt in the words that the policy was trained on; without them it answers badly.

```
{template}
```

## Data

`{data}`, split by prompt. sha256 of the records that it was trained on and watched on: `{digest}`.

## Settings

{settings}

Held-out loss: {before:.3f} -> {after:.3f} nats. Every step's numbers are in `history.json`; versions, device and digests in `stage.json`.

## Limits

{limits}- It answers one prompt at a time: it has not been trained on conversations.
- It has learnt what its file prefers, with whatever is wrong or one-sided there. Nobody has tested it for truth, harm or bias.
- A win rate that `train` printed is that of a judge of sentence embeddings, on prompts of the same file.
"""


def report(measured: list[Evaluation], data: dict, num_held_out: int) -> str:
    """A page that needs no other file and no network: table, warnings, three prompts, curves, data report and settings.

    Args: measured, num_held_out: as for `summary.summary`.
          data: what `data.data_report` found."""
    runs = [each.run for each in measured]
    title = " and ".join(_name(run) for run in runs[1:] or runs)
    figures = [plots.sft_curves(runs[:1], title="SFT: loss of training batches and of held-out prompts")]
    figures += [plots.training_curves([run], title=f"{_name(run)}: held-out loss, and KL from SFT") for run in runs[1:]]
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


def model_card(run: Run) -> str:
    """README.md of the folder of a trained policy, as the model hub reads it."""
    preset, model = run.preset, run.preset.model
    is_folder = model is not None and Path(model).is_dir()
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"tags": ["pdpo", *dict.fromkeys((run.sft.method, run.method))]}
    front |= {"base_model": model} if model and not is_folder else {}
    losses = [row["eval_loss"] for row in run.history if "eval_loss" in row] or [float("nan")]
    began = "random weights" if model is None else Path(model).name if is_folder else model
    limits = "- It began at random weights and knows only what its file taught it: it shows that the pipeline runs, no more.\n"
    return CARD.format(
        front_matter="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        title=_name(run), start=f", from {began}", template=TEMPLATE, data=Path(preset.data).name,
        digest=read_json(run.path / "stage.json")["config"]["data"], limits="" if model else limits, before=losses[0], after=losses[-1],
        settings="\n".join(f"- {key}: {value}" for key, value in asdict(run.train).items()),
    )  # fmt: skip


def _name(run: Run) -> str:
    return run.method.upper() + ("" if run.beta is None else f", beta {run.beta:g}")


def _paragraphs(texts: list[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _table(rows) -> str:
    """An HTML table of these cells, the first row its head."""
    tags = itertools.chain(["th"], itertools.repeat("td"))
    lines = ("".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) for tag, row in zip(tags, rows, strict=False))
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"
