"""Responses a second in sampling, and seconds of a win-rate stage: pdpo against a plain transformers generate loop.

    python benchmarks/win_rate.py                  # GPT-2-small's shape, some minutes on 2 cores
    python benchmarks/win_rate.py --cpu-time --threads 1      # on a machine that others are using, too

Test prompts of the `instructions` data; random weights whose EOS has probability 1/17 at each step, so that responses end after
16 tokens in the mean, as those of the data do (with random weights as they come, none would end). The plain loop is what
a user writes first: batches in the data's order, tokenizer and generate with left padding, every embedding anew. Its best
batch size counts. Both draw at temperature 1; the mean lengths must agree. Interleaved rounds, medians.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from preference_step import SHAPES, tokenizer_of
from transformers import GPT2Config, GPT2LMHeadModel

from pdpo.data import load_split
from pdpo.device import device
from pdpo.encoding import TEMPLATE
from pdpo.evaluation import win_values
from pdpo.models import Judge, load_judge, with_float32_head, with_fused_gelu, without_dropout
from pdpo.presets import get_preset
from pdpo.sampling import sample

MEAN_LENGTH, STAGES = 16, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=110)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64], help="of the plain loop")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds in place of elapsed ones")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    records = load_split("instructions")[2][: arguments.prompts]
    prompts = [record.prompt for record in records]
    tokenizer = tokenizer_of("")
    tokenizer.padding_side = "left"
    policy = policy_that_ends(arguments.shape, tokenizer.eos_token_id)
    faster = with_float32_head(with_fused_gelu(policy_that_ends(arguments.shape, tokenizer.eos_token_id)))

    def plain(batch_size: int) -> list[str]:
        texts = []
        for start in range(0, len(prompts), batch_size):
            batch = [TEMPLATE.format(prompt=prompt) for prompt in prompts[start : start + batch_size]]
            inputs = tokenizer(batch, return_tensors="pt", padding=True).to(device())
            ids = policy.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=arguments.max_new_tokens,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            new = ids[:, inputs.input_ids.shape[1] :]
            lengths.extend(((new != tokenizer.eos_token_id).sum(1)).tolist())
            texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        return texts

    def ours(seed: int) -> list[str]:
        samples = sample(faster, tokenizer, prompts, temperature=1.0, max_new_tokens=arguments.max_new_tokens, seed=seed)
        lengths.extend(len(each.encoded.input_ids) - each.encoded.num_prompt - each.finished for each in samples)
        return [each.text for each in samples]

    loops = {f"transformers generate, batches of {size}": lambda _, size=size: plain(size) for size in arguments.batch_sizes}
    loops["pdpo.sampling.sample"] = ours
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    means: dict[str, list[float]] = {name: [] for name in loops}
    torch.manual_seed(0)
    for number in range(arguments.rounds):
        for name, loop in loops.items():
            print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
            lengths: list[int] = []
            began = clock()
            loop(number)
            seconds[name].append(clock() - began)
            means[name].append(statistics.mean(lengths))
    kind = "processor" if arguments.cpu_time else "elapsed"
    print(f"\nGPT-2-{arguments.shape} shape, {device().type}, {arguments.threads} threads, {kind} seconds, {len(prompts)} prompts, "
          f"at most {arguments.max_new_tokens} new tokens, medians of {arguments.rounds} rounds\n")  # fmt: skip
    best = min((name for name in loops if name != "pdpo.sampling.sample"), key=lambda name: statistics.median(seconds[name]))
    print("| sampling | s | responses/s | times the plain loop's best | mean length |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[best], values, strict=True))
        middle = statistics.median(values)
        print(f"| {name} | {middle:.1f} | {len(prompts) / middle:.1f} | {ratio:.2f} | {statistics.mean(means[name]):.1f} |")
    averages = [statistics.mean(each) for each in means.values()]
    if max(averages) > 1.3 * min(averages):
        sys.exit(f"mean lengths {averages}: not the same distribution.")

    judge_preset = replace(get_preset("tiny"))
    model = load_judge(judge_preset).model
    chosen, rejected = [record.chosen for record in records], [record.rejected for record in records]
    plain_size = int(best.rsplit(" ", 1)[1])
    lengths = []
    began = clock()
    for _ in range(STAGES):
        texts = plain(plain_size)
        vectors = [model.encode(each, normalize_embeddings=True, show_progress_bar=False) for each in (texts, chosen, rejected)]
        plain_wins = (vectors[0] * vectors[1]).sum(-1) > (vectors[0] * vectors[2]).sum(-1)
    plain_seconds = clock() - began
    judge = Judge(model)
    began = clock()
    for seed in range(STAGES):
        our_wins = win_values(judge, ours(seed), chosen, rejected)
    our_seconds = clock() - began
    print(f"\n{STAGES} win-rate stages on the same prompts (as of {STAGES} temperatures), judge {judge_preset.judge}:")
    print(f"plain loop {plain_seconds:.1f} s (last win rate {plain_wins.mean():.2f}), pdpo {our_seconds:.1f} s "
          f"({our_wins.mean():.2f}): {plain_seconds / our_seconds:.2f} times as fast")  # fmt: skip


def policy_that_ends(shape: str, eos: int) -> GPT2LMHeadModel:
    """Random weights, but for a direction that the last layer norm's bias and EOS's row share."""
    width, layers, heads = SHAPES[shape]
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads, eos_token_id=eos))
    direction = torch.nn.functional.normalize(torch.randn(width), dim=0)
    others = torch.tensor(policy.config.vocab_size).log() + 0.02**2 * (width + 400) / 2  # log of the sum of exp(logits)
    with torch.no_grad():
        policy.transformer.ln_f.bias.copy_(20 * direction)
        policy.lm_head.weight[eos] = direction * (others - torch.tensor(float(MEAN_LENGTH)).log()) / 20
    return without_dropout(policy).to(device()).eval()


if __name__ == "__main__":
    os.environ.setdefault("PDPO_DATA_DIR", str(Path(__file__).resolve().parents[2] / "shared/data"))
    main()
