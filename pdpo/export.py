"""The hand-over to TRL: a folder from which its DPOTrainer, under accelerate, takes the steps that our `train` takes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from pdpo import experiments
from pdpo.data import load_split, pairs
from pdpo.encoding import TEMPLATE, Encoded, encode_records
from pdpo.files import check_new_folder, replacing
from pdpo.models import load_tokenizer
from pdpo.presets import Preset, TrainConfig, get_preset
from pdpo.training import batch_indices

README = """# DPO with TRL

Written by `python -m pdpo export-trl` for trl 1.16.0. Run in this folder, which may be moved:

    trl dpo --config dpo.yaml
    accelerate launch -m trl.scripts.dpo --config dpo.yaml    # the same with accelerate's own options

Either leaves the trained policy in `trained/`. `policy/` is the SFT policy: the start and the reference. `train.jsonl` holds
the pairs of {steps} steps of {batch_size}, templated, in pdpo's order, epochs shuffled one by one: one pass is the whole run.

Tokens, batches, loss, AdamW, clipping and the learning rates of the warm-up (steps 1 to {warmup}) equal pdpo's, so in float32
the losses of steps 1 to {compared} agree to rounding. What differs:

- After the warm-up TRL's cosine is one step ahead of pdpo's; both end at a tenth of the peak.
- At step 1 every margin is 0, which TRL counts as wrong and pdpo as half right.
- In half precision pdpo keeps the logits in float32; TRL does not.
- TRL measures nothing held out here, and keeps no checkpoints (`--save_strategy steps` does).

On n GPUs divide `per_device_train_batch_size` by n. Short of memory, divide it and multiply `gradient_accumulation_steps`, or
set `gradient_checkpointing: true`: a step is then still the same pairs.
"""


def export_trl(preset: Preset | str, target: Path, *, beta: float, method: str = "dpo", seed: int = 0) -> Path:
    """Writes SFT policy, pairs and a config with which `trl dpo` goes on where `run_preference` would: see README above.

    Args: preset: data, model, steps, batch size and learning rate; its SFT stage is trained where it is missing.
          target: a new folder, which appears when it is complete; returned. method: "dpo"; the others are refused.
          beta: KL strength; a larger beta keeps the policy closer to the reference.
          seed: of the SFT stage, of which pairs are drawn and of their order.
    Source: trl 1.16.0, trl/trainer/dpo_trainer.py, DPOTrainer._prepare_dataset; transformers 5.23, optimization.py."""
    check_new_folder(target)
    if method != "dpo":
        why = "TRL's DPOTrainer has no place for offsets, scores, rankings or the regularised hinge, and its IPO is another"
        raise ValueError(f"export_trl: expected method 'dpo', got {method!r}. {why}: `python -m pdpo train --method {method}`.")
    preset = get_preset(preset)
    config = replace(preset.preference, method=method, beta=beta, seed=seed)
    train_records = load_split(preset.data)[0]
    rows = _rows(
        load_tokenizer(preset, train_records),  # the one that SFT saves; here, so that bad rows are refused before SFT
        pairs(train_records, num_per_prompt=preset.pairs_per_prompt, seed=seed),  # as run_preference draws them
    )
    sft = experiments.run_sft(preset, seed=seed)
    order = [i for step in range(config.steps) for i in batch_indices(len(rows), config.batch_size, seed=seed, step=step)]
    settings = _settings(config, max_length=preset.context)
    warmup = settings["warmup_steps"]
    with replacing(target) as temporary:
        shutil.copytree(sft.path / "policy", temporary / "policy")
        (temporary / "train.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in order), encoding="utf-8")
        (temporary / "dpo.yaml").write_text("".join(f"{key}: {_yaml(value)}\n" for key, value in settings.items()))
        text = README.format(steps=config.steps, batch_size=config.batch_size, warmup=warmup, compared=warmup + 1)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return target


def _rows(tokenizer, records) -> list[dict]:
    """TRL's columns; ValueError where TRL would not make `encode`'s tokens of them."""
    rows = [
        {"prompt": TEMPLATE.format(prompt=each.prompt), "chosen": each.chosen, "rejected": each.rejected} for each in records
    ]
    if not rows:
        raise ValueError("export_trl: expected at least one pair to train on, got none. Are all scores tied?")
    ours = encode_records(tokenizer, records)
    other = [i for i, row in enumerate(rows) if _trl_tokens(tokenizer, row) != ours[i]]
    if other:
        raise ValueError(
            f"export_trl: expected pairs that TRL tokenises as pdpo does, got {len(other)} of {len(rows)} that it does not, "
            f"the first with the prompt {records[other[0]].prompt[:60]!r}. A pair of more than {tokenizer.model_max_length} "
            "tokens is cut on the left here and on the right in TRL; a special token spelled out in a text stays text only "
            "here; and some tokenizers begin with a token that only TRL adds. Leave such rows out of the data."
        )
    return rows


def _trl_tokens(tokenizer, row: dict) -> list[Encoded]:
    """What DPOTrainer makes of a row: texts joined, EOS spelled at the end, the prompt up to where the token lists part."""
    eos = tokenizer.eos_token
    texts = [row["prompt"] + row[key] + ("" if row[key].endswith(eos) else eos) for key in ("chosen", "rejected")]
    prompt, *joint = tokenizer([row["prompt"], *texts]).input_ids
    num_prompt = len(os.path.commonprefix([prompt, *joint]))
    return [Encoded(ids, num_prompt) for ids in joint]


def _settings(config: TrainConfig, *, max_length: int) -> dict:
    """dpo.yaml: fields of trl's ModelConfig, DatasetMixtureConfig and DPOConfig. Paths are relative to its folder."""
    return {
        "model_name_or_path": "./policy", "dtype": "float32", "output_dir": "./trained",
        "datasets": [{"path": "json", "data_files": "train.jsonl"}],
        "train_sampling_strategy": "sequential",  # the rows lie in our order
        "max_length": max_length, "loss_type": ["sigmoid"], "beta": config.beta,
        "max_steps": config.steps, "per_device_train_batch_size": config.batch_size, "learning_rate": config.lr,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",  # the one whose warm-up is ours; others begin at 0
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": max(round(config.warmup * config.steps), 1),
        "optim": "adamw_torch_fused", "weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm,
        "disable_dropout": True, "gradient_checkpointing": False,
        "bf16": config.precision == "bfloat16", "fp16": config.precision == "float16",
        "seed": config.seed, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip


def _yaml(value) -> str:
    """JSON, which is YAML, but for 5e-06: without a point YAML 1.1 reads a word."""
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text
