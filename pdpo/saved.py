"""What of a run leaves runs/: a folder that transformers loads, with a model card in the model hub's format."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from pdpo.encoding import TEMPLATE
from pdpo.files import check_new_folder, read_json, replacing
from pdpo.results import Run
from pdpo.stages import check_large_files

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


def copy_run(run: Run, target: Path) -> Path:
    """Copies a run's policy, tokenizer, history and record to `target`, a new or an empty folder, and adds a model card."""
    check_new_folder(target)
    check_large_files(run.path)
    with replacing(target) as temporary:
        shutil.copytree(run.path / "policy", temporary)
        for name in ("history.json", "stage.json"):
            shutil.copy(run.path / name, temporary / name)
        (temporary / "README.md").write_text(model_card(run), encoding="utf-8")
    return target


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
        title=run.heading, start=f", from {began}", template=TEMPLATE, data=Path(preset.data).name,
        digest=read_json(run.path / "stage.json")["config"]["data"], limits="" if model else limits, before=losses[0], after=losses[-1],
        settings="\n".join(f"- {key}: {value}" for key, value in asdict(run.train).items()),
    )  # fmt: skip
