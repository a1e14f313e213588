"""Breaks the package one line at a time, each time in a copy, and says which test notices: `python tests/dev/mutants.py`.

Run by hand, from anywhere, with the Python that runs the tests; CI does not run it. A mutant is addressed by the qualified name
of a definition anywhere under pdpo/ and by a piece of its code that stands there once (docstrings do not count), so that moving
a definition to another module changes nothing. Where that is no longer found, or a named test file is gone, the mutant is "NOT
APPLICABLE" and not caught: reword it. With $PDPO_DATA_DIR set, tests of real data take part.
"""

import argparse
import ast
import collections
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}  # nbval takes seconds to load

import pytest  # noqa: E402
import scipy.stats  # noqa: E402, F401
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, GPT2LMHeadModel  # noqa: E402, F401

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # a mutant may well run for ever; then it is caught


class Mutant(NamedTuple):
    name: str  # what the mutation is, as --only takes it
    definition: str  # qualified name: a function, Class.method, function.inner, a class or a module's variable
    text: str
    replacement: str
    tests: str  # the files tests/test_*.py that should notice, the quickest first

    @property
    def files(self) -> list[str]:
        return [f"tests/test_{name}.py" for name in self.tests.split()]


# fmt: off
# ruff: noqa: E501
MUTANTS = [Mutant(*each) for each in (
    # the mathematics
    ("bradley-terry: offset added", "bradley_terry_logps", "- rejected_scores - offset", "- rejected_scores + offset", "preferences"),
    ("plackett-luce: worst first", "plackett_luce_logps", "scores.flip(-1).logcumsumexp(-1).flip(-1)", "scores.logcumsumexp(-1)", "preferences"),
    ("gumbel: sign of the noise", "gumbel_sample", "- exponential.log()", "+ exponential.log()", "preferences"),
    ("gumbel: generator ignored", "gumbel_sample", "exponential_(generator=generator)", "exponential_()", "preferences"),
    ("ranking: worst first", "gumbel_ranking", "descending=True", "descending=False", "preferences"),
    ("ranking: ranks for indices", "gumbel_ranking", "descending=True)", "descending=True).argsort(-1)", "preferences"),
    ("logps: token not shifted", "token_logps", "input_ids[:, 1:, None]", "input_ids[:, :-1, None]", "logps"),
    ("logps: log-softmax in low precision", "token_logps", ".float().log_softmax(-1)", ".log_softmax(-1).float()", "logps"),
    ("logps: mask shifted by one", "sequence_logps", "response_mask[:, 1:]", "response_mask[:, :-1]", "logps"),
    ("logps: mean for sum", "sequence_logps", ".sum(1)", ".mean(1)", "logps"),
    ("logps: mask by multiplying", "sequence_logps", ".masked_fill(~scored, 0.0)", ".mul(scored)", "logps"),
    ("dpo: sign of beta", "_rewards", "return beta * (policy_chosen", "return -beta * (policy_chosen", "losses"),
    ("dpo: beta missing", "_rewards", ", beta * (policy_rejected", ", 1.0 * (policy_rejected", "losses"),
    ("dpo: references swapped", "_rewards", "(policy_chosen - reference_chosen)", "(policy_chosen - reference_rejected)", "losses"),
    ("dpo: chosen and rejected swapped", "dpo_loss", "bradley_terry_logps(chosen_rewards, rejected_rewards", "bradley_terry_logps(rejected_rewards, chosen_rewards", "losses"),
    ("dpo: offset added", "dpo_loss", "offset=offset)", "offset=-offset)", "losses"),
    ("dpo: label smoothing flips nothing", "dpo_loss", "bradley_terry_logps(rejected_rewards, chosen_rewards, offset=-offset)", "bradley_terry_logps(chosen_rewards, rejected_rewards, offset=offset)", "losses"),
    ("dpo: rewards carry a gradient", "dpo_loss", "rejected_rewards.detach()", "rejected_rewards", "losses"),
    ("dpo: half the labels wrong allowed", "dpo_loss", "label_smoothing < 0.5", "label_smoothing <= 0.5", "losses"),
    ("losses: beta 0 allowed", "_check_beta", "0 < beta", "0 <= beta", "losses"),
    ("margins: wrong way round", "PairLoss.margins", "self.chosen_rewards - self.rejected_rewards", "self.rejected_rewards - self.chosen_rewards", "losses"),
    ("offset: ties and flips clamped", "score_offset", "torch.where(difference > 0, difference, 1.0)", "difference.clamp(min=1e-6)", "losses"),
    ("offset: flips as right pairs", "score_offset", "difference > 0, difference, 1.0", "difference != 0, difference.abs(), 1.0", "losses"),
    ("offset: alpha ignored", "score_offset", "return alpha * difference", "return difference", "losses"),
    ("offset: carries a gradient", "score_offset", "chosen_scores.detach(), rejected_scores.detach()", "chosen_scores, rejected_scores", "losses"),
    ("plackett-luce loss: beta missing", "plackett_luce_loss", "beta * (policy_logps", "1.0 * (policy_logps", "losses"),
    ("ipo: target 1 / beta", "ipo_loss", "1 / (2 * beta)", "1 / beta", "losses"),
    ("e-dpo: the difference upside down", "reward_distillation_loss", "score_difference.detach() -", "-score_difference.detach() -", "losses"),
    ("drdo: the weight held constant", "drdo_loss", "policy_chosen_logps)).exp()", "policy_chosen_logps)).exp().detach()", "losses"),
    ("drdo: weighs what is ranked right", "drdo_loss", "bradley_terry_logps(policy_rejected_logps, policy_chosen_logps)", "bradley_terry_logps(policy_chosen_logps, policy_rejected_logps)", "losses"),
    ("drdo: a certain response is infinite", "_log_one_minus_exp", ".clamp(max=-torch.finfo(logps.dtype).eps)", "", "losses"),
    ("slic: margin beta", "slic_loss", "1 / beta -", "beta -", "losses"),
    ("slic: regularization unlearns", "slic_loss", "- regularization *", "+ regularization *", "losses"),
    ("reward model loss: swapped", "reward_model_loss", "(chosen_scores, rejected_scores)", "(rejected_scores, chosen_scores)", "losses"),
    ("ppo: the larger of the two", "ppo_loss", "torch.minimum", "torch.maximum", "losses"),
    ("gae: lambda ignored", "gae", "gamma * lam * running", "gamma * running", "losses"),
    ("unlikelihood: raises both", "unlikelihood_loss", "+ weight *", "- weight *", "losses"),
    ("best of n: the policy of one draw fewer", "best_of_n_logps", "below**n", "below ** (n - 1)", "exact"),
    ("rloo: the sample in its own baseline", "rloo_advantages", " * (num_samples / (num_samples - 1))", "", "rl"),
    ("value loss: the smaller of the two", "value_loss", "torch.maximum", "torch.minimum", "rl"),
    ("token rewards: paid for the KL", "token_rewards", "-beta * log_ratios", "beta * log_ratios", "rl"),
    ("token rewards: the score comes first", "token_rewards", "mask.sum(1, keepdim=True) - 1", "mask.sum(1, keepdim=True) * 0", "rl"),
    ("rollouts: scores of whole tokens past the end", "whitened", ".masked_fill(~mask, 0.0)", "", "rl"),
    ("ppo: the reference moves the ratio", "online_losses", "ppo_loss(tokens.logps, old_logps,", "ppo_loss(tokens.logps, rollouts.reference_logps[rows, :width],", "rl"),
    ("ppo: entropy is punished", "online_losses", "- config.entropy_weight *", "+ config.entropy_weight *", "rl"),
    ("ppo: a resumed run samples anew from the first noise", "train_online", "1_000_003 * config.seed + step", "1_000_003 * config.seed + step - history[-1]['step']", "rl"),
    ("online: the largest of several models' scores", "score_of.score", ".min(0)", ".max(0)", "rl"),
    ("online key: ignores the reward", "run_online", '[model.path.name for model in models] or "toy-gold"', '""', "rl"),
    ("optimum: beta the wrong way", "optimal_policy_logps", "scores / beta", "scores * beta", "exact"),
    ("kl: the other direction", "kl_divergence", "p_logps.exp() *", "q_logps.exp() *", "exact"),
    ("kl: 0 log 0 is nan", "kl_divergence", ".masked_fill(p_logps == -torch.inf, 0.0)", "", "exact"),
    ("objective: pays for KL", "rlhf_objective", "- beta * kl_divergence", "+ beta * kl_divergence", "exact"),
    ("implicit scores: beta the wrong way", "implicit_scores", "return beta * (", "return 1 / beta * (", "exact"),
    ("shared weights: sees the next symbol", "SharedWeightPolicy.__init__", ".tril(-1)", ".tril()", "exact"),
    # data
    ("record: one response allowed", "Preference.__post_init__", "len(self.responses) < 2", "len(self.responses) < 1", "data"),
    ("file: not a number is a score", "is_finite", "math.isfinite(value)", "True", "data"),
    ("file: not best first allowed", "_read", "sorted(scores)[::-1]", "list(record.scores)", "data"),
    ("split: not by prompt", "split", "parts[part_of[record.prompt.strip()]]", "parts[0 if len(parts[0]) < first else 1 if len(parts[1]) < second - first else 2]", "data"),
    ("split: seed ignored", "split", "random.Random(seed).shuffle(prompts)", "random.Random(0).shuffle(prompts)", "data"),
    ("split: by the order of the rows", "split", "sorted({record.prompt.strip() for record in records})", "list(dict.fromkeys(record.prompt.strip() for record in records))", "data"),
    ("pairs: worse first", "pairs", "(texts[i], texts[j])", "(texts[j], texts[i])", "data"),
    ("pairs: ties kept", "pairs", " and ranks[i] != ranks[j]", "", "data"),
    ("pairs: seed ignored", "pairs", "random.Random(seed)", "random.Random(0)", "data"),
    ("scored rows: worst first", "read_scored", "-item[0]", "item[0]", "data"),
    ("report: ties count as flipped", "data_report", "scores[0] < scores[-1]", "scores[0] <= scores[-1]", "data"),
    ("fingerprint: blind to scores", "fingerprint", "record.responses, record.scores", "record.responses", "data"),
    ("toy: worst first", "_responses", "sorted(scored, reverse=True)", "sorted(scored)", "toy"),
    ("toy: unfinished text graded", "grade", "not finished", "False", "toy"),
    ("toy: wrong is as good as right", "grade", "5 * correct", "0 * correct", "toy"),
    ("toy: courtesy excuses rudeness", "grade", '("rude", "courteous")', '("courteous", "rude")', "toy"),
    ("toy split: seed ignored", "split", "rng = random.Random(seed)", "rng = random.Random(0)", "toy"),
    ("toy split: a fact's only phrasing held out", "split", "len(group) == 1", "len(group) == 0", "toy"),
    ("tokenizer: learnt from test prompts, too", "load_tokenizer", "load_split(preset.data)[0] if", "sum(load_split(preset.data), []) if", "models"),
    ("judge: always the default one", "load_judge", "_judge(get_preset(preset).judge", "_judge(DEFAULT_JUDGE", "models"),
    ("judge: loaded each time", "load_judge", "_judge(get_preset", "_judge.__wrapped__(get_preset", "models"),
    ("encode: no EOS", "_tokenized", "ids + [end_id]", "ids", "encoding"),
    ("encode: response cut", "_cut", "Encoded(ids[:num_first] + ids[num_first + surplus :], num_prompt - surplus)", "Encoded(ids[:limit], num_prompt)", "encoding"),
    ("encode: EOS spelled out becomes one", "_tokenized", "split_special_tokens=True", "split_special_tokens=False", "encoding"),
    ("collate: first response token not scored", "collate", "position >= num_prompt", "position > num_prompt", "encoding"),
    ("collate: EOS not scored", "collate", "real & (position >= num_prompt)", "(position < lengths - 1) & (position >= num_prompt)", "encoding"),
    ("collate: padding scored", "collate", "real & (position >= num_prompt)", "position >= num_prompt", "encoding"),
    # training
    ("trees: a token does not see itself", "ancestor_mask", "node[:, None] >= node", "node[:, None] > node", "trees"),
    ("trees: sequences see each other", "ancestor_mask", "node[:, None] < ends", "node[:, None] <= ends", "trees"),
    ("trees: positions restart at branches", "build_tree", "range(shared, len(ids))", "range(len(ids) - shared)", "trees"),
    ("trees: first response token not scored", "build_tree", "path[num_prompt:]", "path[num_prompt + 1 :]", "trees"),
    ("trees: order of the sequences lost", "tree_tokens", ", device=device).argsort()]", ", device=device)]", "trees"),
    ("step: micro batches weigh alike", "_partial_sums", "losses.sum() / count", "losses.mean() * len(part) / len(rows)", "training"),
    ("step: no clipping", "train_step", "config.max_grad_norm)", "1e9)", "training"),
    ("step: gradients pile up", "train_step", "optimizer.zero_grad(set_to_none=True)", "pass", "training"),
    ("row losses: offset ignored", "row_losses", "offset=offset", "offset=0.0", "training"),
    ("row losses: label smoothing ignored", "row_losses", "label_smoothing=config.label_smoothing", "label_smoothing=0.0", "training"),
    ("row losses: the oracle hardly sees labels", "row_losses", "(1 - ORACLE_ALPHA) *", "ORACLE_ALPHA *", "training"),
    ("row losses: drdo's gamma ignored", "row_losses", "config.drdo_gamma", "2.0", "training"),
    ("drdo: scores not at the EOS", "scored_logps", "mask.sum(1) - 1]", "mask.sum(1) - 2]", "training"),
    ("accuracy: a tie is wrong", "row_losses", "margins.abs() < 1e-4, 0.5", "margins.abs() < 0, 0.5", "training"),
    ("reference: rows mixed up", "with_reference_logps", "zip(part, logps.tolist(), strict=True)", "zip(sorted(part), logps.tolist(), strict=True)", "training"),
    ("rate: begins at zero", "learning_rate", "(step + 1) / warmup", "step / warmup", "training"),
    ("rate: falls to zero", "learning_rate", "0.1 + 0.9 * 0.5", "0.0 + 1.0 * 0.5", "training"),
    ("batches: seed ignored", "batch_indices", "1_000_003 * seed + epoch", "epoch", "training"),
    ("batches: every epoch alike", "batch_indices", "* seed + epoch", "* seed", "training"),
    ("resume: a step is skipped", "train", "range(first, config.steps)", "range(first + 1, config.steps)", "training"),
    ("reference: of the first batch alone", "drawn_rows", "config.steps * config.batch_size", "config.batch_size", "training"),
    ("resume: optimizer begins anew", "Checkpoint.load", "part.load_state_dict(state[name])", 'name == "optimizer" or part.load_state_dict(state[name])', "training"),
    ("resume: RNG not restored", "Checkpoint.load", 'torch.set_rng_state(state["rng"])', "pass", "training"),
    ("resume: another config's checkpoint", "load_checkpoint", "if differ:", "if not saved:", "training"),
    # sampling
    ("sample: padding is seen", "_extend", "attention_mask[row, longest - len(ids) :] = 1", "attention_mask[row] = 1", "sampling"),
    ("sample: positions from one", "_extend", ".cumsum(1) - 1)", ".cumsum(1))", "sampling"),
    ("sample: temperature the wrong way", "_extend", "logits / temperature", "logits * temperature", "sampling"),
    ("sample: rows mixed up when one ends", "_extend", "each[going_on] for each in (live, tokens,", "each[: len(going_on)] for each in (live, tokens,", "sampling"),
    ("sample: noise of the wrong sign", "_extend", "noise = -uniform", "noise = uniform", "sampling"),
    ("sample: the noise of those that ended moves up", "_extend", "noise[live]", "noise[: len(live)]", "sampling"),
    ("sample: samples of a prompt mixed up", "_extend", "each.repeat_interleave(num_samples, 0)", "each.repeat(num_samples, *[1] * (each.ndim - 1))", "sampling"),
    ("top-p: a token too few", "within_top_p", "probabilities.cumsum(-1) - probabilities", "probabilities.cumsum(-1)", "sampling"),
    ("sample: top-p ignored", "_extend", "within_top_p(logits, top_p)", "logits", "sampling"),
    ("sample: seed ignored", "sample", "manual_seed(seed)", "manual_seed(0)", "sampling"),
    ("sample: always finished", "sample", "finished = response_ids[-1] == eos", "finished = True", "sampling"),
    ("sample: no room for the response", "sample", "tokenizer.model_max_length - max_new_tokens", "tokenizer.model_max_length - 1", "sampling"),
    # evaluation
    ("kl exact: the other direction", "sequence_kl", "p.exp() * (p - q)", "q.exp() * (q - p)", "evaluation"),
    ("kl k1: sign", "sequence_kl", "-log_ratio, log_ratio.expm1()", "log_ratio, log_ratio.expm1()", "evaluation"),
    ("kl k3: ratio upside down", "sequence_kl", "log_ratio.expm1() - log_ratio", "(-log_ratio).expm1() + log_ratio", "evaluation"),
    ("kl: samples in another order", "sequence_kl", "results[:, rows] =", "results[:, start : start + batch_size] =", "evaluation"),
    ("win: a tie is a loss", "win_values", "< TIE, 0.5", "< TIE, 0.0", "evaluation"),
    ("win: farther is better", "win_values", "(difference > 0)", "(difference < 0)", "evaluation"),
    ("grades: finished ignored", "toy_grades", "finished=each.finished", "finished=True", "evaluation"),
    ("column: samples of other prompts", "Evaluation.samples", "reshape(len(self.rows) // self.num_samples, -1)", "reshape(-1, len(self.rows) // self.num_samples).T", "experiments"),
    ("components: sample variance of all", "variance_components", "values.var(2, ddof=1).mean()", "values.var(ddof=1)", "statistics"),
    ("best of n: with replacement", "best_of", "math.comb(rank, n - 1)", "(rank + 1) ** n - rank**n", "statistics"),
    ("Holm: all alike", "holm", "len(p_values) - np.arange(len(p_values))", "len(p_values) + 0 * np.arange(len(p_values))", "statistics"),
    ("bootstrap: S of S seeds", "bootstrap_interval", "max(len(of_seed) - 1, 1)", "len(of_seed)", "statistics"),
    ("bootstrap: seeds not drawn again", "bootstrap_interval", "of_seed[seeds].mean(1)", "of_seed[np.sort(seeds) * 0 + np.arange(len(of_seed))].mean(1)", "statistics"),
    ("bootstrap: one tail", "bootstrap_interval", "(1 - level) / 2", "(1 - level)", "statistics"),
    ("pareto: equal KL never beats", "pareto_set", "kl[:, None] <= kl", "kl[:, None] < kl", "statistics"),
    ("height: area, not mean", "height_between", " / (high - low)", "", "statistics"),
    ("height: knots of one frontier", "height_between", "np.concatenate([kl, other_kl])", "kl", "statistics"),
    ("frontier: draws not paired", "resampled", "frontier.points(seeds, prompts)", "frontier.points(rng.integers(num_seeds, size=num_seeds), prompts)", "statistics"),
    ("rankings: worst first", "bootstrapped_rankings", "reverse=True", "reverse=False", "statistics"),
    ("reward: not at the EOS", "last_hidden", "lengths - 1]", "lengths - 2]", "evaluation statistics experiments"),
    ("reward: weights not scaled back", "fit_reward_head", "(weights / scale)", "(weights * scale)", "evaluation statistics experiments"),
    ("calibration: bins from zero", "calibration", "(confidence - 0.5) * 2 * num_bins", "confidence * num_bins", "evaluation statistics experiments"),
    ("calibration: bins weigh alike", "calibration", 'row["pairs"] * abs(', "abs(", "evaluation statistics experiments"),
    # experiments and stages
    ("stage key: ignores the ingredients", "run_stage", "key = _digest(config)[:10]", "key = _digest({})[:10]", "experiments"),
    ("stage key: ignores the code", "run_stage", "code_version(build)", '""', "reach"),
    ("preference key: ignores the data", "run_preference", '"data": fingerprint(records + held_out_records)', '"data": ""', "experiments"),
    ("preference key: ignores the SFT stage", "run_preference", '"sft": sft.path.name', '"sft": ""', "experiments"),
    ("preference: alpha 0 is the preset's", "run_preference", '{"seed": sft.seed} | changes', '{"seed": sft.seed} | {key: value for key, value in changes.items() if value}', "experiments"),
    ("preference: pairs of another seed", "run_preference", "num_per_prompt=preset.pairs_per_prompt, seed=sft.seed", "num_per_prompt=preset.pairs_per_prompt, seed=0", "experiments"),
    ("preference: begins at random weights", "run_preference.build", "sft.load_tokenizer(), sft.load_policy()", "sft.load_tokenizer(), load_policy(sft.preset)", "experiments"),
    ("drdo: learns from the frozen reward model", "run_preference", "run_oracle(sft, records=records)", "run_reward_model(sft)", "experiments"),
    ("drdo: its head is lost", "save_in", '{"weights": head.tolist()}', '{"weights": [0.0] * len(head)}', "experiments"),
    ("oracle: other records than were given", "run_oracle", "if records is None", "if True", "experiments"),
    ("reference cache: blind to the rows", "with_cached_reference", "[row.sequences for row in wanted]", "len(wanted)", "experiments"),
    ("win rate: judged against the second best", "run_win_rate.build", "record.responses[-1]", "record.responses[1]", "experiments"),
    ("win rate key: ignores the judge", "run_win_rate", '"judge": judge_digest(preset.judge)', '"judge": ""', "experiments"),
    ("win rate key: ignores the samples", "run_win_rate", '"num_samples": num_samples, "num_judged"', '"num_samples": 0, "num_judged"', "experiments"),
    ("win rate: KL of the reference", "run_win_rate.build", "sequence_kl(policy, sft.load_policy()", "sequence_kl(sft.load_policy(), policy", "experiments statistics"),
    ("frontier: one seed's records for all", "run_frontiers", "records[sft.seed]", "records[sfts[0].seed]", "statistics"),
    ("frontier: betas and seeds mixed up", "frontier_of", "reshape(num_seeds, len(betas), -1)", "reshape(len(betas), num_seeds, -1).swapaxes(0, 1)", "statistics"),
    # nothing silently wrong
    ("trust: digests not compared", "damage", "file_sha256(path / name) != digest", "not (path / name).exists()", "trust"),
    ("trust: a record's own digest not compared", "damage", 'record.pop("digest") != _digest(record)', 'not record.pop("digest")', "trust"),
    ("trust: large weights never read", "check_large_files", "if reason := damage(path, large=True):", "if reason := '':", "trust"),
    ("trust: a file takes its name before it is on the disk", "replacing", "flush(temporary)", "pass", "trust"),
    ("trust: a stage takes its name before it is on the disk", "run_stage", "flush(partial)", "pass", "trust"),
    ("trust: a checkpoint's seal not looked at", "load_checkpoint", "not is_whole(path)", "False", "trust"),
    ("trust: other seals not looked at", "read_sealed", "not is_whole(path)", "False", "trust"),
    ("trust: a folder known by its files' times", "source_digest", "file_sha256(path)", "str(path.stat().st_mtime)", "trust"),
    ("trust: a stage of other libraries taken", "library_versions", '"torch": torch.__version__', '"torch": ""', "trust"),
    ("trust: missing tensors are random", "_whole", '"missing", "unexpected"', '"unexpected"', "trust"),
    ("trust: damage is deleted, not set aside", "set_aside", "os.replace(path, target)", "os.rename(path, f'/tmp/{os.getpid()}-{path.name}')", "trust"),
    # what a person sees at the end, and asks afterwards
    ("person: overfitting not seen", "warnings", "losses[-1] > 1.02 * min(losses)", "False", "report"),
    ("person: wide intervals not said", "warnings", "> 0.2 or", "> 2 or", "report"),
    ("person: random weights not said", "warnings", "sft.preset.model is None", "False", "report"),
    ("person: units not said", "warnings", "len(measured) > 2", "False", "report"),
    ("person: a length gap not said", "warnings", "if not 2 / 3 < length / tokens[0] < 1.5:", "if False:", "report"),
    ("person: answers of another prompt", "side_by_side", "[:: each.num_samples]", "[1 :: each.num_samples]", "report"),
    ("person: few prompts not said", "warnings", "num < 30", "False", "report"),
    ("person: a page's text is code", "_table", "html.escape(str(cell))", "str(cell)", "report"),
    ("person: the minutes of what is done", "progress", "total - done - number", "total - number", "cells"),
    ("person: a line stays behind", "progress", '"leave": False', '"leave": True', "cells"),
    ("person: the template ends elsewhere", "chat_template", "{{ messages[-1]['content'] | trim + eos_token }}", "{{ messages[-1]['content'] | trim }}", "encoding"),
    ("person: white space of a prompt kept", "chat_template", "{{ prompt[0]['content'] | trim }}", "{{ prompt[0]['content'] }}", "encoding"),
    ("win rate: another reference ignored", "run_win_rate", "reference or run.sft", "run.sft", "experiments"),
    ("win rate: the judge sees the last samples", "run_win_rate.build", "i % num_samples < num_judged", "i % num_samples >= num_samples - num_judged", "experiments"),
    ("tilt: towards the worst", "tilted", "/ beta)", "/ -beta)", "statistics"),
    ("p-value: one side", "p_value", "math.erfc(", "0.5 * math.erfc(", "statistics"),
)]
# fmt: on


class NotApplicable(Exception):
    """The mutant does not fit the code as it is now."""


def definitions(tree: ast.Module) -> dict[str, list[ast.stmt]]:
    """The definitions of one module by their qualified names."""
    found = collections.defaultdict(list)

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[prefix + node.name].append(node)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    found[prefix + ast.unparse(target)].append(node)

    visit(tree.body, "")
    return found


def mutated(package: Path, mutant: Mutant) -> tuple[Path, str]:
    """The file that the mutant changes and its new source."""
    missing = [file for file in mutant.files if not (package.parent / file).is_file()]
    if missing:
        raise NotApplicable(f"there is no {', '.join(missing)}")
    found, places = False, []
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in definitions(ast.parse(source))[mutant.definition]:
            found = True
            lines = source.splitlines(keepends=True)
            first, last = node.lineno - 1, node.end_lineno
            doc = node.body[0] if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) else None
            for start, end in ((first, doc.lineno - 1), (doc.end_lineno, last)) if doc else ((first, last),):
                code = "".join(lines[start:end])
                changed = "".join(lines[:start]) + code.replace(mutant.text, mutant.replacement) + "".join(lines[end:])
                places += [(path, changed)] * code.count(mutant.text)
    if len(places) != 1:
        raise NotApplicable(
            f"{mutant.text!r} is {len(places)} times in {mutant.definition}" if found else f"there is no {mutant.definition}"
        )
    try:
        compile(places[0][1], str(places[0][0]), "exec")
    except SyntaxError as error:
        raise NotApplicable(f"it does not compile: {error}") from None
    return places[0]


class Trial:
    """One run of pytest in a fork of this process, which has loaded the large libraries, so that a mutant takes a second."""

    def __init__(self, checkout: Path, files: list[str], *, thorough: bool = False, seconds: float = SECONDS):
        self.began, self.until, self.log = time.monotonic(), time.monotonic() + seconds, checkout / "pytest.log"
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setsid()
            os.chdir(checkout)
            os.environ["PYTHONPATH"] = sys.path[0] = str(checkout)  # also for the processes that tests start
            sys.dont_write_bytecode = True
            with open(self.log, "wb") as log:
                for stream in (1, 2):
                    os.dup2(log.fileno(), stream)
            options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
            status = pytest.main([*options, *files])
            if thorough and status == 0:
                command = [sys.executable, "-m", "pytest", *options, "tests", *(f"--ignore={file}" for file in files)]
                status = subprocess.call(command)
            sys.stdout.flush()
            os._exit(int(status))
        finally:
            os._exit(99)

    def ended(self) -> bool:
        late = time.monotonic() > self.until
        if late:
            os.killpg(self.pid, signal.SIGKILL)
        pid, status = os.waitpid(self.pid, 0 if late else os.WNOHANG)
        if pid:
            said = self.log.read_text(encoding="utf-8", errors="replace")
            failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", said, re.MULTILINE)
            self.seconds = round(time.monotonic() - self.began, 1)
            self.passed = status == 0
            self.failed = "no end" if late else failed[1] if failed else f"exit status {os.waitstatus_to_exitcode(status)}"
        return bool(pid)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="a mutant's name or a part of it; more than once for more of them")
    parser.add_argument("--thorough", action="store_true", help="try the whole suite on what survives the files named for it")
    parser.add_argument("--out", type=Path, help="a JSON file for the verdicts")
    parser.add_argument("-j", type=int, default=1, metavar="N", help="mutants at a time")
    options = parser.parse_args()
    chosen = [each for each in MUTANTS if not options.only or any(part in each.name for part in options.only)]
    if not chosen or options.j < 1:
        parser.error(f"expected -j of at least 1 and --only of some of: {', '.join(each.name for each in MUTANTS)}")
    results = []

    def report(mutant: Mutant, verdict: str, by: str, seconds: float = 0.0) -> None:
        results.append(mutant._asdict() | {"verdict": verdict, "by": by, "seconds": seconds})
        print(f"{verdict:14} {seconds:6.1f} s  {mutant.name}  ({by})", flush=True)

    with tempfile.TemporaryDirectory(prefix="pdpo-mutants-") as folder:
        skipped = shutil.ignore_patterns(".git", ".venv", "runs", "figures", "__pycache__", ".*_cache")
        copies = [Path(shutil.copytree(ROOT, Path(folder) / str(number), ignore=skipped)) for number in range(options.j)]
        named = sorted({file for each in chosen for file in each.files if (ROOT / file).is_file()})
        unbroken = Trial(copies[0], named, seconds=math.inf)
        while not unbroken.ended():
            time.sleep(0.1)
        if not unbroken.passed:
            print(f"{unbroken.failed} fails without any mutation: mend that first, else nothing can be told")
            return 2
        print(f"the tests pass as they are ({unbroken.seconds} s)", flush=True)
        waiting, running = chosen[::-1], {}
        while waiting or running:
            while waiting and copies:
                mutant, copy = waiting.pop(), copies.pop()
                try:
                    path, source = mutated(copy / "pdpo", mutant)
                except NotApplicable as reason:
                    report(mutant, "NOT APPLICABLE", str(reason))
                    copies.append(copy)
                    continue
                original = path.read_bytes()
                path.write_text(source, encoding="utf-8")
                running[Trial(copy, mutant.files, thorough=options.thorough)] = (mutant, copy, path, original)
            for trial in [each for each in running if each.ended()]:
                mutant, copy, path, original = running.pop(trial)
                path.write_bytes(original)
                copies.append(copy)
                verdict = ("SURVIVED", mutant.tests) if trial.passed else ("caught", trial.failed)
                report(mutant, *verdict, trial.seconds)
            time.sleep(0.05)
    score = collections.Counter(each["verdict"] for each in results)
    print(f"{score['caught']} of {len(results)} caught, {score['SURVIVED']} survived, {score['NOT APPLICABLE']} not applicable")
    if options.out:
        options.out.write_text(json.dumps({"score": score, "mutants": results}, indent=1) + "\n", encoding="utf-8")
    return 0 if score["caught"] == len(results) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
