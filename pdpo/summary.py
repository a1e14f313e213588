"""What `train` says at its end: a table, three prompts side by side, and plain warnings about what the numbers cannot bear."""

import itertools

import numpy as np

from pdpo.results import Evaluation
from pdpo.statistics import with_interval


def summary(measured: list[Evaluation], num_held_out: int) -> str:
    """The closing lines of a training command.

    Args: measured: the evaluation of the SFT policy at temperature 1, then those of what was trained from it.
          num_held_out: prompts that losses were watched on."""
    lines = table(measured)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [note(measured, num_held_out), *(f"note: {warning}" for warning in warnings(measured))]
    for row in side_by_side(measured):
        text.append(f"\n{row.pop('prompt')[:100]!r}")
        text += [f"  {name:8} {answer[:100]!r}" for name, answer in row.items()]
    return "\n".join(text)


def table(measured: list[Evaluation]) -> list[list[str]]:
    """The closing table: its head, and a line a policy."""
    head = ["policy", "held-out loss", "ranked right", "KL", "SBERT win rate [95 %]", "tokens an answer", "n"]
    return [head, *map(_line, measured)]


def note(measured: list[Evaluation], num_held_out: int) -> str:
    """What the table's numbers are in, and measured on."""
    return (
        f"losses: nats (SFT's a token, the others' a pair, each in its own unit), before -> after, {num_held_out} held-out prompts; "
        "KL: nats a response, from SFT; n: test prompts, at temperature 1, of KL, win rate and tokens"
    )


def side_by_side(measured: list[Evaluation], num: int = 3) -> list[dict[str, str]]:
    """The first test prompts, each with its chosen response and every policy's answer, by their names."""
    firsts = [each.rows[:: each.num_samples] for each in measured]  # all on the same prompts in the same order
    return [
        {"prompt": rows[0]["prompt"], "chosen": rows[0]["chosen"]}
        | {each.run.method: row["text"] for each, row in zip(measured, rows, strict=True)}
        for rows in itertools.islice(zip(*firsts, strict=True), num)
    ]


def warnings(measured: list[Evaluation]) -> list[str]:
    """What a reader should know before believing the table."""
    sft, found = measured[0].run, []
    losses = [row["eval_loss"] for row in sft.history if "eval_loss" in row]
    if losses[-1] > 1.02 * min(losses):
        step = next(row["step"] for row in sft.history if row.get("eval_loss") == min(losses))
        found.append(
            f"SFT's held-out loss was lowest at step {step} ({min(losses):.3f}, at the end {losses[-1]:.3f}): it overfits; "
            f"try --sft-steps {max(step, 1)}."
        )
    for each in measured:
        interval = with_interval("win", each.column("win"))
        low, high, num = interval["win_low"], interval["win_high"], len(each.column("win"))
        if high - low > 0.2 or num < 30:
            found.append(f"{num} test prompts: {each.run.method}'s win rate is anything from {low:.2f} to {high:.2f}.")
            break
    if sft.preset.model is None:
        found.append("this policy began at random weights: the pipeline runs, but it knows only what the file taught it.")
    if len(measured) > 2:
        found.append("losses of different methods are in different units: compare KL, win rates, and the answers.")
    tokens = [_tokens(each) for each in measured]
    for each, length in zip(measured[1:], tokens[1:], strict=True):
        if not 2 / 3 < length / tokens[0] < 1.5:
            found.append(
                f"{each.run.method}'s answers have {length:.0f} tokens, SFT's {tokens[0]:.0f}: its wins may be those of length."
            )
    return found


def _line(evaluation: Evaluation) -> list[str]:
    run, wins = evaluation.run, with_interval("win", evaluation.column("win"))
    rows = [row for row in run.history if "eval_loss" in row]
    right = rows[-1].get("eval_accuracy")
    return [
        run.method,
        f"{rows[0]['eval_loss']:.3f} -> {rows[-1]['eval_loss']:.3f}",
        "" if right is None else f"{right:.3f}",
        f"{evaluation.column('kl').mean():.2f}",
        f"{wins['win']:.3f} [{wins['win_low']:.3f}, {wins['win_high']:.3f}]",
        f"{_tokens(evaluation):.1f}",
        f"{len(evaluation.column('win'))}",
    ]


def _tokens(evaluation: Evaluation) -> float:
    return float(np.mean(evaluation.column("num_tokens")))
