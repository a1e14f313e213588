"""ex_04: log-probabilities of tokens and of responses: the shift, the mask, the EOS, and padding on either side."""

import torch
from torch import tensor

from pdpo.exercises.core import task


def _tokens(logits, input_ids):
    return logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)


def _sequence(logits, input_ids, response_mask):
    return _tokens(logits, input_ids).masked_fill(~response_mask[:, 1:], 0.0).sum(1)


def _draw(generator, batch, length, vocabulary):
    logits = 2 * torch.randn(batch, length, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (batch, length), generator=generator)


def _padded(generator):
    """Ids, attention and prompt lengths of six rows, padded left or right; pad and EOS are both token 0."""

    def lengths(low, high):
        return torch.randint(low, high + 1, (6, 1), generator=generator)

    ids, prompt, left = torch.randint(1, 9, (6, 7), generator=generator), lengths(1, 3), tensor([[1], [1], [1], [0], [0], [0]])
    total = prompt + lengths(1, 4)
    column = torch.arange(7) - left * (7 - total)
    attention = (column >= 0) & (column < total)
    return ids.masked_fill(~attention | (column == total - 1), 0), attention, prompt.squeeze(1)


def _token_cases(generator):
    yield "two tokens: logits[:, 0] predict the second one", tensor([[[1.0, 3.0], [0.0, 5.0]]]), tensor([[1, 0]])
    yield "a nearly impossible token has a finite log-probability", tensor([[[0.0, 900.0], [0.0, 0.0]]]), tensor([[1, 0]])
    yield "every token after the first", *_draw(generator, 3, 5, 7)


def _mask_cases(generator):
    yield "no padding: prompt, word, EOS", tensor([[5, 6, 0]]), tensor([[1, 1, 1]]) > 0, tensor([1])
    yield (
        "padded on the right: the EOS counts, the padding does not",
        tensor([[5, 6, 0, 0]]),
        tensor([[1, 1, 1, 0]]) > 0,
        tensor([1]),
    )
    yield (
        "padded on the left: the prompt begins after the padding",
        tensor([[0, 5, 6, 0]]),
        tensor([[0, 1, 1, 1]]) > 0,
        tensor([1]),
    )
    yield "each row has a prompt length of its own", tensor([[5, 6, 7, 0]] * 2), tensor([[1, 1, 1, 1]] * 2) > 0, tensor([1, 2])
    yield "both sides, prompts and responses of several lengths", *_padded(generator)


def _position_cases(generator):
    yield "no padding: 0, 1, 2", tensor([[1, 1, 1]]) > 0
    yield "padded on the left: the first real token is at 0", tensor([[0, 1, 1]]) > 0
    yield "padded on the right: padding is at 0", tensor([[1, 1, 1, 0, 0]]) > 0
    yield "rows with either", _padded(generator)[1]


def _sequence_cases(generator):
    small = tensor([[[1.0, 3.0], [0.0, 5.0]]]), tensor([[1, 0]]), tensor([[False, True]])
    yield "one response token is scored by the logits before it", *small
    logits, ids = _draw(generator, 1, 3, 4)
    yield "the prompt is not scored", logits, ids, tensor([[False, False, True]])
    yield "two response tokens, the EOS last: both count, and they add up", logits, ids, tensor([[False, True, True]])
    ids, attention, prompt = _padded(generator)
    mask = attention & (attention.cumsum(1) > prompt[:, None])
    yield "padding on either side, several lengths", 2 * torch.randn(6, 7, 9, generator=generator), ids, mask


# fmt: off
TASKS = (
    task("token_logps", "ex_04", "def token_logps(logits, input_ids):", (
        "Which token does logits[:, 0] speak about: the first or the second?",
        "T columns of logits make T - 1 predictions: drop the last column of logits and the first token.",
        "log_softmax over V of logits[:, :-1], then gather(2, input_ids[:, 1:, None]) and squeeze(2).",
    ), _tokens, _token_cases, (
        ("no shift: logits[:, t] predict token t + 1, not token t", lambda x, i: _tokens(x.roll(-1, 1), i)),
        ("shifted the wrong way: logits are matched with the token before", lambda x, i: _tokens(x.flip(1), i.flip(1)).flip(1)),
        ("raw logits: not normalised over the vocabulary", lambda x, i: x[:, :-1].gather(2, i[:, 1:, None]).squeeze(2)),
        ("normalised over the positions, not over the vocabulary",
         lambda x, i: x[:, :-1].log_softmax(1).gather(2, i[:, 1:, None]).squeeze(2)),
        ("log(softmax(x)) underflows to log(0): use log_softmax",
         lambda x, i: x[:, :-1].softmax(-1).gather(2, i[:, 1:, None]).squeeze(2).log()),
        ("T columns: the first token, which nothing predicts, is scored, too",
         lambda x, i: x.log_softmax(-1).gather(2, i[:, :, None]).squeeze(2)),
    ), gradient=(0,)),
    task("response_mask", "ex_04", "def response_mask(input_ids, attention_mask, prompt_lengths):", (
        "Number the real tokens of each row 0, 1, 2, ...: from which number on do they belong to the response?",
        "attention_mask.cumsum(1) - 1 numbers them, wherever the padding is. Do not look for the pad id: the EOS has it, too.",
        "attention_mask & (attention_mask.cumsum(1) - 1 >= prompt_lengths[:, None]).",
    ), lambda i, a, p: a & (a.cumsum(1) > p[:, None]), _mask_cases, (
        ("counted from column 0: right only without padding on the left",
         lambda i, a, p: a & (torch.arange(i.shape[1]) >= p[:, None])),
        ("padding after the response is scored: ask attention_mask, too", lambda i, a, p: a.cumsum(1) > p[:, None]),
        ("the EOS is lost: it has the id of the padding, so ids cannot tell them apart",
         lambda i, a, p: (i != 0) & (a.cumsum(1) > p[:, None])),
        ("one token too late: the first response token is left out", lambda i, a, p: a & (a.cumsum(1) - 1 > p[:, None])),
        ("one token too early: the last prompt token is scored", lambda i, a, p: a & (a.cumsum(1) >= p[:, None])),
        ("this is the prompt; the response is asked", lambda i, a, p: a & (a.cumsum(1) <= p[:, None])),
        ("the prompt is scored, too: this is attention_mask", lambda i, a, p: a.clone()),
    )),
    task("position_ids", "ex_04", "def position_ids(attention_mask):", (
        "A model that was trained without padding saw its first token at position 0. Where does it stand here?",
        "Count the real tokens so far with cumsum; the first of them must get 0, not 1.",
        "(attention_mask.cumsum(1) - 1) where attention_mask is True, and 0 elsewhere.",
    ), lambda a: (a.cumsum(1) - 1).masked_fill(~a, 0), _position_cases, (
        ("columns: padding on the left pushes every token along", lambda a: torch.arange(a.shape[1]).expand(a.shape).clone()),
        ("columns with padding at 0: padding on the left still pushes every token along",
         lambda a: torch.arange(a.shape[1]) * a),
        ("counting begins at 1; the first real token is at 0", lambda a: a.cumsum(1) * a),
        ("padding on the left is at -1, which no embedding has", lambda a: a.cumsum(1) - 1),
        ("padding on the right goes on with the last position; 0 is asked there", lambda a: (a.cumsum(1) - 1).clamp(min=0)),
        ("counted from the end of the row", lambda a: (a.flip(1).cumsum(1).flip(1) - 1) * a),
    )),
    task("sequence_logps", "ex_04", "def sequence_logps(logits, input_ids, response_mask):", (
        "The probability of a response is a product over its tokens. What is its logarithm?",
        "token_logps has T - 1 columns and the mask has T. Which column of the mask has no prediction?",
        "token_logps(logits, input_ids), with 0 where response_mask[:, 1:] is False, summed over dimension 1.",
    ), _sequence, _sequence_cases, (
        ("the mask is shifted the wrong way: response_mask[:, 1:] belongs to the T - 1 predictions, not [:, :-1]",
         lambda x, i, m: _tokens(x, i).masked_fill(~m[:, :-1], 0.0).sum(1)),
        ("a mean over the response: it makes long responses free; the sum is asked",
         lambda x, i, m: _sequence(x, i, m) / m.sum(1)),
        ("the mask is not used: prompt and padding are scored, too", lambda x, i, m: _tokens(x, i).sum(1)),
        ("no shift: logits[:, t] predict token t + 1, not token t", lambda x, i, m: _sequence(x.roll(-1, 1), i, m)),
        ("raw logits: not normalised over the vocabulary",
         lambda x, i, m: x[:, :-1].gather(2, i[:, 1:, None]).squeeze(2).masked_fill(~m[:, 1:], 0.0).sum(1)),
        ("the last response token, the EOS, is dropped",
         lambda x, i, m: _sequence(x, i, m & (m.flip(1).cumsum(1).flip(1) > 1))),
        ("the mask is turned round: all but the response is scored", lambda x, i, m: _sequence(x, i, ~m)),
        ("a mean over all columns: padding changes the result", lambda x, i, m: _sequence(x, i, m) / (m.shape[1] - 1)),
        ("probabilities are added; it is the log-probabilities that add up",
         lambda x, i, m: _tokens(x, i).exp().masked_fill(~m[:, 1:], 0.0).sum(1)),
    ), gradient=(0,)),
)
