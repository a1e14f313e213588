r"""PPO and RLOO: learning from scores of the policy's own samples, the half of RLHF that DPO does without.

`online_step` is the algorithm, `train_online` the schedule; `presets.OnlineConfig` switches the details.

beta: KL strength; a larger beta keeps the policy closer to the reference."""

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pdpo.checkpoint import Checkpoint
from pdpo.device import autocast
from pdpo.encoding import Encoded, collate
from pdpo.losses import gae, ppo_loss
from pdpo.presets import OnlineConfig
from pdpo.progress import progress
from pdpo.sampling import Sample, sample
from pdpo.training import Row, batch_indices, fastest_logps, learning_rate, shared_policy_logps
from pdpo.trees import tree_tokens


def rloo_advantages(rewards: Tensor) -> Tensor:
    r"""How much better each sample was than the mean of the *other* samples of its prompt: an unbiased baseline that costs nothing.

    .. math:: A_i = r_i - \frac{1}{K - 1} \sum_{j \ne i} r_j
    Args: rewards: (P, K) of K >= 2 whole responses to each prompt, the price of the KL in them.
    Returns: (P, K); every row sums to 0.
    Source: Ahmadian 2024, arXiv:2402.14740, Eq. 8 (RLOO); Kool 2019."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        got = f"{tuple(rewards.shape)}. Draw more samples."
        raise ValueError(f"rloo_advantages: expected (P, K) rewards with K >= 2, got {got}")
    num_samples = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (num_samples / (num_samples - 1))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    r"""Half the squared error of the values, or of values that have moved by the clip at most, whichever is larger.

    .. math:: \mathcal{L}^V = \tfrac12 \max\Big( (V - R)^2, \;
              \big(V_\text{old} + \text{clip}(V - V_\text{old}, -\epsilon, \epsilon) - R\big)^2 \Big)
    Args: values: (...) carry the gradient; old_values, returns: (...) constants. clip: epsilon > 0, or None for the plain square.
    Returns: (...) unreduced. No gradient where a value has moved further than the clip, towards its return.
    Source: Schulman 2017, arXiv:1707.06347, Eq. 9, has the plain square; the clip is of its authors' code, openai/baselines' ppo2."""
    if not values.shape == old_values.shape == returns.shape:
        got = ", ".join(str(tuple(each.shape)) for each in (values, old_values, returns))
        raise ValueError(f"value_loss: expected three tensors of one shape, got {got}. Pass one of each per token.")
    if clip is not None and not clip > 0:
        raise ValueError(f"value_loss: expected clip > 0, or None to clip nothing, got {clip}. At 0 no value may move.")
    error = (values - returns.detach()) ** 2
    if clip is None:
        return error / 2
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(error, (near - returns) ** 2) / 2


def token_rewards(scores: Tensor, log_ratios: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    r"""Rewards of single tokens: each pays for its part of the KL, and the last one also gets the response's score.

    .. math:: r_t = -\beta \log \frac{\pi_\theta(y_t|x, y_{<t})}{\pi_\text{ref}(y_t|x, y_{<t})} + [t = T] \, r(x, y)
    Args: scores: (R,); log_ratios: (R, T) nats; mask: (R, T) bool, True at a response's tokens, which come first in each row.
          beta: KL strength; a larger beta keeps the policy closer to the reference. 0 leaves the scores alone.
    Returns: (R, T), 0 past the end. A row sums to the score minus beta times its log-ratio.
    Source: Ziegler 2019, arXiv:1909.08593, Eq. 2, token by token."""
    if log_ratios.shape != mask.shape or scores.shape != mask.shape[:1]:
        got = ", ".join(str(tuple(each.shape)) for each in (scores, log_ratios, mask))
        raise ValueError(f"token_rewards: expected (R,) scores and (R, T) log_ratios and mask, got {got}. One row a response.")
    rewards = (-beta * log_ratios).masked_fill(~mask, 0.0)
    return rewards.scatter_add(1, mask.sum(1, keepdim=True) - 1, scores[:, None])


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """(R, T) with mean 0 and standard deviation 1 over the mask, 0 outside of it."""
    inside = values[mask]
    return ((values - inside.mean()) / (inside.std() + 1e-8)).masked_fill(~mask, 0.0)


class Tokens(NamedTuple):
    """Of each token of R responses, (R, T) float32 each, 0 past the end: log-probability, value before it, entropy there (nats)."""

    logps: Tensor
    values: Tensor
    entropies: Tensor


def response_tokens(policy, sequences: list[Encoded], *, on_trees: bool, precision: str = "float32") -> Tokens:
    """`Tokens` of the responses, by the token trees or by the plain path; a policy without a value_head has values 0."""
    device = next(policy.parameters()).device

    def measure(logits, hidden, heads, tokens) -> Tensor:
        log_probs = logits.log_softmax(-1)  # (P, V)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        values = hidden.float() @ policy.value_head if hasattr(policy, "value_head") else torch.zeros_like(entropies)
        return torch.stack([log_probs[heads, tokens], values[heads], entropies[heads]], 1)  # (E, 3)

    with autocast(device, precision):
        if on_trees:
            return Tokens(*tree_tokens(policy, sequences, measure=measure).unbind(2))
        batch = collate(sequences, device=device)
        mask = batch.attention_mask.long()
        output = policy(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    scored = batch.response_mask[:, 1:]  # (R, N-1)
    logits, hidden = output.logits[:, :-1][scored], output.hidden_states[-1][:, :-1][scored]
    tokens = batch.input_ids[:, 1:][scored]
    found = measure(logits.float(), hidden, torch.arange(len(tokens), device=device), tokens)
    return Tokens(*pad_sequence(found.split(scored.sum(1).tolist()), batch_first=True).unbind(2))


class Rollouts(NamedTuple):
    """Samples of one step and what is known of them before it: R responses, K of a prompt side by side; constants."""

    sequences: list[Encoded]
    mask: Tensor  # (R, T) bool, True at the tokens of a response
    old: Tokens  # of the policy that drew them
    reference_logps: Tensor  # (R, T)
    advantages: Tensor  # (R, T); RLOO's (R, 1)
    returns: Tensor  # (R, T): what the values should have been


@torch.no_grad()
def rollouts_of(tokens_of, policy, reference, sequences: list[Encoded], scores: Tensor, config: OnlineConfig) -> Rollouts:
    """Log-probabilities, rewards and advantages of what the policy has just sampled; scores: (R,)."""
    parts = [sequences[i : i + config.micro_batch_size] for i in range(0, len(sequences), config.micro_batch_size)]
    old, reference_tokens = (_joined([tokens_of(model, part) for part in parts]) for model in (policy, reference))
    lengths = torch.tensor([[len(ids) - num_prompt] for ids, num_prompt in sequences], device=scores.device)  # (R, 1)
    mask = torch.arange(old.logps.shape[1], device=scores.device) < lengths  # (R, T)
    beta = config.beta if config.kl_in == "reward" else 0.0
    rewards = token_rewards(scores, old.logps - reference_tokens.logps, mask, beta=beta)
    if config.method == "rloo":  # a response is one action
        advantages, actions = rloo_advantages(rewards.sum(1).view(-1, config.num_samples)).view(-1, 1), mask[:, :1]
    else:
        advantages, actions = gae(rewards, old.values, gamma=config.gamma, lam=config.lam), mask
    returns = (advantages + old.values).masked_fill(~mask, 0.0)
    advantages = whitened(advantages, actions) if config.whiten else advantages.masked_fill(~actions, 0.0)
    return Rollouts(sequences, mask, old, reference_tokens.logps, advantages, returns)


def _joined(parts: list[Tokens]) -> Tokens:
    """One `Tokens` of several, as long as the longest."""
    columns = ([row for each in column for row in each] for column in zip(*parts, strict=True))
    return Tokens(*(pad_sequence(column, batch_first=True) for column in columns))


def online_losses(tokens: Tokens, rollouts: Rollouts, rows: Tensor, config: OnlineConfig) -> dict[str, Tensor]:
    """Sums over the responses `rows` of the rollouts, with the gradient: loss, and detached its parts; PPO's over tokens."""
    old, width = Tokens(*(each[rows] for each in rollouts.old)), tokens.logps.shape[1]
    mask, advantages = rollouts.mask[rows, :width], rollouts.advantages[rows, :width]
    old_logps = old.logps[:, :width]  # (B, T)
    log_ratio = rollouts.reference_logps[rows, :width] - tokens.logps  # (B, T), reference / policy
    if config.method == "rloo":  # a response is one action
        policy_losses = ppo_loss(tokens.logps.sum(1), old_logps.sum(1), advantages[:, 0], clip=config.clip)  # (B,)
        value_losses = torch.zeros_like(policy_losses)
    else:
        policy_losses = ppo_loss(tokens.logps, old_logps, advantages, clip=config.clip)  # (B, T)
        value_losses = value_loss(tokens.values, old.values[:, :width], rollouts.returns[rows, :width], clip=config.value_clip)
        policy_losses, value_losses = (each.masked_fill(~mask, 0.0).sum(1) for each in (policy_losses, value_losses))
    k3 = (log_ratio.expm1() - log_ratio).masked_fill(~mask, 0.0).sum(1)
    loss = policy_losses + config.value_weight * value_losses - config.entropy_weight * tokens.entropies.sum(1)
    loss = loss + config.beta * k3 if config.kl_in == "loss" else loss
    clipped = ((tokens.logps - old_logps).exp() - 1).abs() > config.clip
    sums = {"loss": loss, "policy_loss": policy_losses, "value_loss": value_losses}
    sums |= {"entropy": tokens.entropies, "clipped": clipped & mask}
    return {key: (value if key == "loss" else value.detach()).sum() for key, value in sums.items()}


def online_step(policy, optimizer, rollouts: Rollouts, config: OnlineConfig, *, tokens_of: Callable, seed: int, scaler) -> dict:
    """num_epochs passes over the rollouts, in num_parts optimizer steps each; parts hold whole prompts, which trees share.

    Returns: means over the steps of the losses, the entropy (nats a token), the share of tokens whose ratio was outside the clip,
        and the gradient's norm before clipping (inf where float16's scaler left a step out)."""
    generator, totals, num_steps = torch.Generator().manual_seed(seed), {}, config.num_epochs * config.num_parts
    for _ in range(config.num_epochs):
        for prompts in torch.randperm(config.batch_size, generator=generator).chunk(config.num_parts):
            rows = (prompts[:, None] * config.num_samples + torch.arange(config.num_samples)).flatten()
            num_tokens = int(rollouts.mask[rows].sum())
            count = len(rows) if config.method == "rloo" else num_tokens
            optimizer.zero_grad(set_to_none=True)
            record = {}
            for part in rows.split(config.micro_batch_size):
                sums = online_losses(tokens_of(policy, [rollouts.sequences[i] for i in part]), rollouts, part, config)
                scaler.scale(sums["loss"] / count).backward()
                for key, value in sums.items():
                    mean = float(value.detach()) / (num_tokens if key in ("entropy", "clipped") else count)
                    record[key] = record.get(key, 0.0) + mean
            scaler.unscale_(optimizer)
            record["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
            scale_too_high = scaler.is_enabled() and scaler.get_scale() > 1  # it is halved then, and this step left out
            if not math.isfinite(record["loss"]) or not (math.isfinite(record["grad_norm"]) or scale_too_high):
                raise ValueError(
                    f"online_step: expected a finite loss and gradient, got {record['loss']} and {record['grad_norm']}. Lower lr."
                )
            scaler.step(optimizer)
            scaler.update()
            totals = {key: totals.get(key, 0.0) + value / num_steps for key, value in record.items()}
    return totals


def train_online(
    policy, reference, tokenizer, prompts: list[str], score: Callable[[list[Sample]], Tensor], config: OnlineConfig, *,
    max_new_tokens: int, measure: Callable = lambda policy: {}, checkpoint: Path | None = None, checkpoint_seconds: float = 30.0,
    show_progress: bool = True,
) -> list[dict]:  # fmt: skip
    """Trains `policy` in place, as `training.train` does: with a checkpoint it goes on where a killed run stopped, bit for bit.

    Args: policy: a causal language model without dropout; gets a parameter `value_head`, (D,), which begins at 0.
          reference: a copy of what it was; never trained. prompts: to sample for, a batch after another.
          score: of samples, (R,) floats; its standard deviation should be about 1. A response that did not end loses no_eos_penalty.
          measure: function(policy) -> dict of held-out numbers, as in `train`.
    Returns: History, one dict a step (not an optimizer step, of which each has several): step, epoch, lr, score, kl (k1, nats a
        response), num_tokens (sampled), and what `online_step` returns."""
    if not prompts:
        raise ValueError("train_online: expected at least one prompt, got none. Is the training split empty?")
    device = next(policy.parameters()).device
    drawn = [prompts[i] for i in batch_indices(len(prompts), 2, seed=config.seed, step=0)]
    options = {"temperature": 1.0, "max_new_tokens": max_new_tokens, "precision": config.precision}
    tried = sample(policy, tokenizer, drawn, seed=config.seed, **options)
    on_trees = fastest_logps(policy, [Row((each.encoded,)) for each in tried]) is shared_policy_logps
    tokens_of = partial(response_tokens, on_trees=on_trees, precision=config.precision)
    policy.value_head = torch.nn.Parameter(torch.zeros(policy.config.hidden_size, device=device))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    saved = Checkpoint(checkpoint, asdict(config), checkpoint_seconds, policy=policy, optimizer=optimizer, scaler=scaler)
    history = saved.load() or [{"step": 0, "epoch": 0.0} | measure(policy)]
    measure_every = max(config.steps // config.num_evaluations, 1)
    first = history[-1]["step"]
    for step in progress(range(first, config.steps), config.method, done=first, hidden=not show_progress):
        lr = optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        batch = [prompts[i] for i in batch_indices(len(prompts), config.batch_size, seed=config.seed, step=step)]
        seed = 1_000_003 * config.seed + step  # noise and order are functions of (seed, step): a resumed run meets the same
        samples = sample(policy, tokenizer, batch, seed=seed, num_samples=config.num_samples, **options)
        ended = torch.tensor([each.finished for each in samples])
        scores = (score(samples).float() - config.no_eos_penalty * (~ended).float()).to(device)
        rollouts = rollouts_of(tokens_of, policy, reference, [each.encoded for each in samples], scores, config)
        kl = (rollouts.old.logps - rollouts.reference_logps).sum(1).mean()
        record = {"step": step + 1, "epoch": (step + 1) * config.batch_size / len(prompts), "lr": lr}
        record |= {"score": float(scores.mean()), "kl": float(kl), "num_tokens": int(rollouts.mask.sum())}
        record |= online_step(policy, optimizer, rollouts, config, tokens_of=tokens_of, seed=seed, scaler=scaler)
        if (step + 1) % measure_every == 0 or step + 1 == config.steps:
            record |= measure(policy)
        history.append(record)
        if step + 1 < config.steps:
            saved.save_when_due(history)
    policy.eval()
    return history
