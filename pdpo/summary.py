"""What `train` says at its end: a table, three prompts side by side, and plain warnings about what the numbers cannot bear."""

import itertools

import numpy as np

from pdpo.results import Evaluation
from pdpo.statistics import with_interval


def summary(measured: list[Evaluation], num_held_out: int) -> str:
    """The closing lines of a training command.

    Args: measured: the evaluation of the SFT policy at temperature 1, then those of what was trained from it.
          num_held_out: prompts that losses were watched on."""
    text = [line.rstrip() for line in aligned(table(measured))]
    text += [note(measured, num_held_out), *(f"note: {warning}" for warning in warnings(measured))]
    for row in side_by_side(measured):
        text.append(f"\n{row.pop('prompt')[:100]!r}")
        text += [f"  {name:8} {answer[:100]!r}" for name, answer in row.items()]
    return "\n".join(text)


def aligned(lines: list[list[str]], justify=str.ljust) -> list[str]:
    """A table's lines as texts whose columns stand below one another."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(justify, line, widths)) for line in lines]


def table(measured: list[Evaluation]) -> list[list[str]]:
    """The closing table: its head, and a line a policy."""
    lines = [["policy", "held-out loss", "ranked right", "KL", "SBERT win rate [95 %]", "tokens an answer", "n"]]
    for each in measured:
        first, *_, last = [row for row in each.run.history if "eval_loss" in row]
        right, wins = last.get("eval_accuracy"), each.column("win")
        losses = f"{first['eval_loss']:.3f} -> {last['eval_loss']:.3f}"
        numbers = [in_brackets(wins), f"{_tokens(each):.1f}", f"{len(wins)}"]
        lines.append([each.run.method, losses, "" if right is None else f"{right:.3f}", f"{each.means['kl']:.2f}", *numbers])
    return lines


def in_brackets(wins) -> str:
    """A win rate with its 95 % interval."""
    return "{win:.3f} [{win_low:.3f}, {win_high:.3f}]".format(**with_interval("win", wins))


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
        seen = f"lowest at step {step} ({min(losses):.3f}, at the end {losses[-1]:.3f})"
        found.append(f"SFT's held-out loss was {seen}: it overfits; try --sft-steps {max(step, 1)}.")
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
            lengths = f"{each.run.method}'s answers have {length:.0f} tokens, SFT's {tokens[0]:.0f}"
            found.append(f"{lengths}: its wins may be those of length.")
    return found


def _tokens(evaluation: Evaluation) -> float:
    return float(np.mean(evaluation.column("num_tokens")))
