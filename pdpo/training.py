r"""Training: `train_step` is the algorithm, `train` is the schedule. One code for SFT and for preferences.

beta: KL strength; a larger beta keeps the policy closer to the reference."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from pdpo import losses as formulas
from pdpo.checkpoint import Checkpoint, Memory
from pdpo.device import autocast
from pdpo.distributed import broadcast_weights, gather, on_leader, share, sum_gradients, summed, world_size
from pdpo.encoding import collate
from pdpo.logps import sequence_logps
from pdpo.presets import WITH_HEAD, WITHOUT_REFERENCE, TrainConfig
from pdpo.progress import progress
from pdpo.rows import Row, preference_rows  # noqa: F401  (the second is for notebooks)
from pdpo.trees import supports_trees, tree_logps

ORACLE_ALPHA = 0.01  # Nath 2024, arXiv:2410.08458, Eq. 5 and its footnote 5: how much the language model counts


def policy_logps(policy, rows: list[Row], *, precision: str = "float32") -> Tensor:
    """(B, K) nats: the log-probability of every response of every row. The plain path: pad, run, gather, sum."""
    device = next(policy.parameters()).device
    batch = collate([each for row in rows for each in row.sequences], device=device)
    with autocast(device, precision):
        logits = policy(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits
    return sequence_logps(logits, batch.input_ids, batch.response_mask).view(len(rows), -1)  # (B, K)


def scored_logps(policy, rows: list[Row], *, precision: str = "float32") -> tuple[Tensor, Tensor]:
    """(B, K) nats, those of `policy_logps`, and (B, K) scores: `policy.reward_head` on the last hidden state of each response."""
    device = next(policy.parameters()).device
    batch = collate([each for row in rows for each in row.sequences], device=device)
    with autocast(device, precision):
        mask = batch.attention_mask.long()
        output = policy(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    hidden = output.hidden_states[-1][torch.arange(len(mask), device=device), mask.sum(1) - 1]  # (B * K, D): at the EOS
    logps = sequence_logps(output.logits, batch.input_ids, batch.response_mask)
    return logps.view(len(rows), -1), (hidden.float() @ policy.reward_head).view(len(rows), -1)


def shared_policy_logps(policy, rows: list[Row], *, precision: str = "float32") -> Tensor:
    """(B, K) nats: the numbers of `policy_logps` by the fast path, on token trees."""
    with autocast(next(policy.parameters()).device, precision):
        return tree_logps(policy, [each for row in rows for each in row.sequences]).view(len(rows), -1)  # (B, K)


def fastest_logps(policy, rows: list[Row]) -> Callable:
    """`shared_policy_logps`, or `policy_logps` where the two differ on this policy; then it prints why.

    Both are tried on two of the rows, the longest among them: no list of architectures could be complete."""
    tried = [rows[0], max(rows, key=lambda row: row.num_tokens)]
    policy.eval()
    with torch.no_grad():
        expected = policy_logps(policy, tried).flatten()
    reason = supports_trees(policy, [each for row in tried for each in row.sequences], expected)
    if reason:
        print(f"{type(policy).__name__} runs on padded batches, not on token trees, which would be faster: {reason}")
    return policy_logps if reason else shared_policy_logps


@torch.no_grad()
def with_reference_logps(reference, rows: list[Row], *, micro_batch_size: int, precision: str = "float32") -> list[Row]:
    """The rows with the reference's log-probabilities, computed once: the reference never changes, so neither do they."""
    if not rows:
        return []
    logps_of = fastest_logps(reference, rows)
    reference.eval()
    known: dict[int, list[float]] = {}
    parts = micro_batches(share(len(rows)), rows, micro_batch_size, logps_of)
    for part in progress(parts, "log-probabilities of the reference"):
        logps = logps_of(reference, [rows[i] for i in part], precision=precision)
        known |= zip(part, logps.tolist(), strict=True)
    for of_one_process in gather(known):
        known |= of_one_process
    return [replace(row, reference_logps=tuple(known[i])) for i, row in enumerate(rows)]


def row_losses(policy, rows: list[Row], config: TrainConfig, *, logps_of: Callable = policy_logps) -> tuple[Tensor, dict]:
    """(B,) losses of some rows, with the gradient, and (B,) detached measurements of them."""
    if config.method in WITH_HEAD:
        logps, scores = scored_logps(policy, rows, precision=config.precision)  # (B, 2), (B, 2)
    else:
        logps = logps_of(policy, rows, precision=config.precision)  # (B, K)
    if config.method == "sft":
        return formulas.sft_loss(logps[:, 0]), {}
    offset = torch.tensor([row.offset for row in rows], device=logps.device)  # (B,)
    summed_logps = logps.detach()
    per_token = torch.ones_like(logps)
    if config.mean_logps or config.method in ("simpo", "orpo"):
        lengths = [[len(each.input_ids) - each.num_prompt for each in row.sequences] for row in rows]
        per_token = 1 / torch.tensor(lengths, device=logps.device)  # (B, K)
    logps = logps * per_token
    if config.method not in WITHOUT_REFERENCE:
        reference_logps = torch.tensor([row.reference_logps for row in rows], device=logps.device) * per_token  # (B, K)
    if config.method == "oracle":
        losses = (1 - ORACLE_ALPHA) * formulas.reward_model_loss(*scores.unbind(1)) - ORACLE_ALPHA * logps[:, 0]
        chosen, rejected = scores.detach().unbind(1)
    elif config.method == "drdo":
        oracle = (offset, torch.zeros_like(offset))  # only their difference counts
        strength = {"alpha": config.drdo_alpha, "gamma": config.drdo_gamma}
        losses, chosen, rejected = formulas.drdo_loss(*logps.unbind(1), *scores.unbind(1), *oracle, **strength)
    elif config.method == "simpo":
        strength = {"scale": config.simpo_scale, "offset": config.simpo_offset}
        losses, chosen, rejected = formulas.simpo_loss(*logps.unbind(1), **strength)
    elif config.method in ("unlikelihood", "preferred-ft"):
        weight = config.unlikelihood_weight if config.method == "unlikelihood" else 0.0
        losses, chosen, rejected = formulas.unlikelihood_loss(*logps.unbind(1), weight=weight)
    elif config.method == "orpo":
        losses, chosen, rejected = formulas.orpo_loss(*logps.unbind(1), weight=config.orpo_weight)
    elif config.method == "plackett_luce":
        losses = formulas.plackett_luce_loss(logps, reference_logps, beta=config.beta)
        rewards = config.beta * (logps - reference_logps).detach()
        chosen, rejected = rewards[:, 0], rewards[:, -1]
    else:
        pair = (logps[:, 0], logps[:, 1], reference_logps[:, 0], reference_logps[:, 1])
        if config.method == "slic":
            losses, chosen, rejected = formulas.slic_loss(*pair, beta=config.beta, regularization=config.slic_weight)
        elif config.method == "ipo":
            losses, chosen, rejected = formulas.ipo_loss(*pair, beta=config.beta)
        elif config.method == "kto":
            kl = (logps[:, 2] - reference_logps[:, 2]).mean().clamp(min=0)  # of a micro batch
            losses, chosen, rejected = formulas.kto_loss(*pair, kl, beta=config.beta)
        elif config.method == "edpo":
            losses, chosen, rejected = formulas.reward_distillation_loss(*pair, offset, beta=config.beta)
        else:
            losses, chosen, rejected = formulas.dpo_loss(
                *pair, beta=config.beta, offset=offset, label_smoothing=config.label_smoothing
            )
    margins = chosen - rejected
    # a margin of zero up to rounding, as at the start, is half right: else the first accuracy would be noise
    accuracy = torch.where(margins.abs() < 1e-4, 0.5, (margins > 0).float())
    measured = {"margin": margins, "accuracy": accuracy, "chosen_reward": chosen, "rejected_reward": rejected}
    worst = 1 if config.method == "kto" else -1
    return losses, measured | {"chosen_logp": summed_logps[:, 0], "rejected_logp": summed_logps[:, worst]}


def train_step(
    policy, optimizer, rows: list[Row], config: TrainConfig, *, logps_of: Callable = policy_logps, scaler=None
) -> dict[str, float]:
    """One optimizer step on the mean loss of `rows`, in micro batches whose gradients add up to that of one large batch.

    Args: policy, optimizer, rows, config: as in `train`; of several processes each is given all rows and computes its share.
          logps_of: `policy_logps`, or what `fastest_logps` gives.
          scaler: a GradScaler, for float16, which would round small gradients to zero; None scales nothing.
    Returns: loss (nats; for SFT per token, else per row), grad_norm before clipping (inf where the scaler left the step out),
        and for preferences the means of margin, accuracy, chosen_reward, rejected_reward, chosen_logp and rejected_logp."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    policy.train()
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for sums in _partial_sums(policy, rows, config, logps_of):
        scaler.scale(sums["loss"]).backward()
        totals = {key: totals.get(key, 0.0) + value.detach() for key, value in sums.items()}
    sum_gradients(policy)
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    record = summed({key: float(value) for key, value in totals.items()}) | {"grad_norm": float(grad_norm)}
    scale_too_high = scaler.is_enabled() and scaler.get_scale() > 1  # the scaler then halves it and leaves this step out
    if not math.isfinite(record["loss"]) or not (math.isfinite(record["grad_norm"]) or scale_too_high):
        got = f"loss {record['loss']}, grad_norm {record['grad_norm']}. Lower the learning rate, or train in float32."
        raise ValueError(f"train_step: expected a finite loss and gradient, got {got}")
    scaler.step(optimizer)
    scaler.update()
    return record


@torch.no_grad()
def evaluate_rows(policy, rows: list[Row], config: TrainConfig, *, logps_of: Callable = policy_logps) -> dict[str, float]:
    """The same numbers as `train_step` on held-out rows, without a gradient, under keys eval_*."""
    policy.eval()
    totals: dict[str, float] = {}
    for sums in _partial_sums(policy, rows, config, logps_of):
        totals = {f"eval_{key}": totals.get(f"eval_{key}", 0.0) + float(value) for key, value in sums.items()}
    return summed(totals)


def _partial_sums(policy, rows: list[Row], config: TrainConfig, logps_of: Callable) -> Iterator[dict[str, Tensor]]:
    """For each micro batch of this process's share, what it adds to the mean loss and to the other means over all rows."""
    tokens = sum(len(row.sequences[0].input_ids) - row.sequences[0].num_prompt for row in rows)
    count = tokens if config.method == "sft" else len(rows)
    parts = micro_batches(share(len(rows)), rows, config.micro_batch_size, logps_of)
    for part in progress(parts, "held-out loss", hidden=torch.is_grad_enabled()):  # a step is an item of the run's own line
        losses, measured = row_losses(policy, [rows[i] for i in part], config, logps_of=logps_of)
        yield {"loss": losses.sum() / count} | {key: value.sum() / len(rows) for key, value in measured.items()}


def train(
    policy, rows: list[Row], config: TrainConfig, *, held_out: list[Row] = (), measure=None,
    checkpoint: Path | None = None, checkpoint_seconds: float = 30.0, show_progress: bool = True,
) -> list[dict]:  # fmt: skip
    """Trains `policy` in place; with a checkpoint file, goes on where a killed run stopped and ends with the same bits.

    In a `distributed.process_group` all processes call this with the same arguments, and get the same history.

    Args:
        policy: a causal language model without dropout; for DRDO and its oracle one that `models.with_reward_head` made.
        rows: the training rows; for every method that has a reference, those of `drawn_rows` with reference_logps.
        config: hyperparameters; part of the checkpoint.
        held_out: rows that `eval_*` numbers are measured on, before the first step, then config.num_evaluations times, the last
            time after the last step; never, if that is 0.
        measure: function(policy) -> dict of more held-out numbers (the KL, say); must not draw from global generators.
            Of several processes the leader calls it.
        checkpoint: file for interrupted runs, the same one for all processes; the caller removes it.
        checkpoint_seconds: at most this much work is lost; 0 saves after each step.
        show_progress: a bar, and before a run of minutes a line that says how many.
    Returns: History, one dict an optimizer step: step, epoch, loss, lr, grad_norm, ... Measurements stand in the dict of the
        step after which they were made; step 0 holds those from before the first."""
    _check_rows(rows, config)
    if config.method in WITH_HEAD and not hasattr(policy, "reward_head"):
        wanted = "a policy with a reward head, got one without"
        raise ValueError(f"train: {config.method} expected {wanted}. See models.with_reward_head.")
    logps_of = policy_logps if config.method in WITH_HEAD else fastest_logps(policy, rows)
    memory = Memory(policy, rows, config)
    shared = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    optimizer = (torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW)(policy.parameters(), **shared)
    scaler = torch.amp.GradScaler(memory.device.type, enabled=config.precision == "float16")
    saved = Checkpoint(checkpoint, asdict(config), checkpoint_seconds, policy=policy, optimizer=optimizer, scaler=scaler)
    history = saved.load()
    broadcast_weights(policy)

    def evaluation() -> dict:
        if not config.num_evaluations:
            return {}
        optimizer.zero_grad(set_to_none=True)  # room for what is measured
        numbers = evaluate_rows(policy, held_out, memory.config, logps_of=logps_of) if held_out else {}
        return numbers | (on_leader(lambda: measure(policy)) if measure else {})

    began = time.monotonic()
    if not history:
        history.append({"step": 0, "epoch": 0.0} | evaluation())
    measuring = (time.monotonic() - began) * config.num_evaluations
    evaluate_every = max(config.steps // max(config.num_evaluations, 1), 1)
    name = config.method if config.beta is None else f"{config.method} beta={config.beta}"
    first = history[-1]["step"]
    for step in progress(range(first, config.steps), name, done=first, hidden=not show_progress, later=measuring):
        lr = optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        batch = [rows[i] for i in batch_indices(len(rows), config.batch_size, seed=config.seed, step=step)]
        numbers = memory.fit(lambda fitting: train_step(policy, optimizer, batch, fitting, logps_of=logps_of, scaler=scaler))  # noqa: B023
        record = {"step": step + 1, "epoch": (step + 1) * config.batch_size / len(rows), "lr": lr} | numbers
        if (step + 1) % evaluate_every == 0 or step + 1 == config.steps:
            record |= evaluation()
        history.append(record)
        if step + 1 < config.steps:
            saved.save_when_due(history)
    policy.eval()
    return history


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to config.lr, then a cosine down to a tenth of it; `step` counts from 0."""
    warmup = max(round(config.warmup * config.steps), 1)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(config.steps - warmup, 1)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def batch_indices(num_rows: int, batch_size: int, *, seed: int, step: int) -> list[int]:
    """The rows of one step: a pure function of (seed, step), so that a resumed run sees what an unbroken one would.

    Epochs are shuffled one by one and laid end to end; a batch may span two. No grouping by length: on data in which length
    goes with quality, that would bias each step."""
    indices, position = [], step * batch_size
    while len(indices) < batch_size:
        epoch, start = divmod(position, num_rows)
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(num_rows, generator=generator)
        taken = order[start : start + batch_size - len(indices)].tolist()
        indices += taken
        position += len(taken)
    return indices


def drawn_rows(num_rows: int, config: TrainConfig) -> list[int]:
    """The rows that a run's steps will draw, in ascending order: all of them where it lasts an epoch."""
    return sorted(batch_indices(num_rows, min(config.steps * config.batch_size, num_rows), seed=config.seed, step=0))


def micro_batches(indices, rows: list[Row], max_sequences: int, logps_of: Callable) -> list[list[int]]:
    """Cuts one batch into parts of at most max_sequences sequences (at least one row).

    They are sorted by length, so that the plain path pads less, or by their tokens, so that trees share more."""
    on_trees = logps_of is shared_policy_logps
    parts: list[list[int]] = []
    size = 0
    for i in sorted(indices, key=lambda i: (rows[i].sequences[0].input_ids if on_trees else rows[i].num_tokens, i)):
        if not parts or size + len(rows[i].sequences) > max_sequences:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += len(rows[i].sequences)
    return parts


def _check_rows(rows: list[Row], config: TrainConfig) -> None:
    if not rows:
        raise ValueError("train: expected at least one row to train on, got none. Is the training split empty?")
    if config.batch_size < (num := world_size()):
        got = f"the number of processes, got {config.batch_size}. Start fewer processes or raise batch_size."
        raise ValueError(f"train: expected a batch_size of at least {num}, {got}")
    if config.method == "sft":
        return
    missing = [i for i in drawn_rows(len(rows), config) if rows[i].reference_logps is None]
    if missing and config.method not in WITHOUT_REFERENCE:
        raise ValueError(
            f"train: rows {missing[:10]} have no reference_logps: run with_reference_logps(reference, rows) first."
        )
    sizes = {len(row.sequences) for row in rows}
    if config.method == "plackett_luce":
        if len(sizes) > 1 or min(sizes) < 2:
            raise ValueError(f"train: expected one K >= 2 for all rankings, got K in {sorted(sizes)}. Group the data by K.")
    elif sizes != {3 if config.method == "kto" else 2}:
        got = f"K in {sorted(sizes)}. Use data.pairs."
        raise ValueError(f"train: {config.method} expected rows with K = 2 responses, got {got}")
