"""Wrong answers to exercises 01 to 04 that look right, as a student would write them, and a second right answer to each task.

LOOKALIKES: task -> {words that the message must hold: wrong function}; SECOND: task -> right function of another form.
What else a check knows by name (`Task.mistakes`) plays the student in test_exercises.py and is not written out here.
"""

import math

import torch
import torch.nn.functional as F


def places(scores):
    """(K, B) log-probability of each place among those that are left."""
    return torch.stack([scores[:, k] - scores[:, k:].logsumexp(1) for k in range(scores.shape[1])])


def picked(values, ids):
    return values.gather(2, ids.unsqueeze(-1)).squeeze(-1)


def tokens(logits, ids):
    return -F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def mask_loop(ids, attention, prompt):
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for b, row in enumerate(attention):
        mask[b, row.nonzero().flatten()[prompt[b] :]] = True
    return mask


def positions_loop(attention):
    rows = torch.zeros(attention.shape, dtype=torch.int64)
    for b, row in enumerate(attention):
        rows[b, row] = torch.arange(int(row.sum()))
    return rows


LOOKALIKES = {
    "gumbel_noise": {
        "a minus is missing": lambda u: torch.log(torch.log(1 / u)),
        "1 - u in place of u": lambda u: -torch.log(-torch.log1p(-u)),
        "none of the usual": lambda u: math.sqrt(2) * torch.erfinv(2 * u - 1),
        "off by the same": lambda u: -torch.log(-torch.log(u)) - 0.5772157,
    },
    "gumbel_ranking": {
        "ascending": lambda s, n: torch.argsort(s + n, dim=1),
        "ranks": lambda s, n: torch.argsort(torch.argsort(-(s + n), dim=1), dim=1),
        "noisy scores are returned": lambda s, n: torch.topk(s + n, s.shape[1], dim=1).values,
        "down the batch": lambda s, n: torch.sort(s + n, dim=0, descending=True).indices,
    },
    "bradley_terry": {
        "offset is added": lambda c, r, o: -F.softplus(r - c - o),
        "outside the sigmoid": lambda c, r, o: F.logsigmoid(c - r) - o,
        "underflows": lambda c, r, o: torch.log(1 / (1 + torch.exp(-(c - r - o)))),
        "rows are averaged": lambda c, r, o: F.logsigmoid(c - r - o).mean(),
        "no gradient": lambda c, r, o: F.logsigmoid((c - r - o).data),
    },
    "winner_logps": {
        "exp of large scores overflows": lambda s: torch.log(torch.exp(s) / torch.exp(s).sum(1, keepdim=True)),
        "the softmax underflows": lambda s: torch.log(torch.softmax(s, 1)),
        "largest of the batch": lambda s: (x := s - s.max()) - torch.log(torch.exp(x).sum(1, keepdim=True)),
        "hides the underflow": lambda s: torch.log(torch.softmax(s, 1) + 1e-10),
    },
    "plackett_luce": {
        "already must be taken out": lambda s: sum(torch.log_softmax(s, 1)[:, k] for k in range(s.shape[1])),
        "the worst is chosen first": lambda s: sum(s[:, k] - s[:, : k + 1].logsumexp(1) for k in range(s.shape[1])),
        "compared in pairs": lambda s: sum(F.logsigmoid(s[:, k] - s[:, k + 1]) for k in range(s.shape[1] - 1)),
        "overflows or underflows": lambda s: sum(s[:, k] - s[:, k:].exp().sum(1).log() for k in range(s.shape[1])),
        "logarithm is missing": lambda s: places(s).sum(0).exp(),
    },
    "first_places": {
        "the rest is thrown away": lambda s, m: places(s[:, :m]).sum(0),
        "an order nobody gave": lambda s, m: places(s).sum(0),
        "the first m as a set": lambda s, m: torch.softmax(s - s.amax(1, True), 1)[:, :m].sum(1).log(),
        "one place too few": lambda s, m: places(s)[: m - 1].sum(0),
    },
    "log_partition": {
        "the reference is left out": lambda p, s, b: torch.logsumexp(s / b, 0),
        "divided by N": lambda p, s, b: torch.logsumexp(p + s / b, 0) - torch.log(torch.tensor(float(len(s)))),
        "the mean score": lambda p, s, b: torch.dot(p.exp(), s) / b,
        "overflows": lambda p, s, b: torch.log(torch.dot(torch.exp(p), torch.exp(s / b))),
    },
    "optimal_policy": {
        "so it divides": lambda p, s, b: torch.log_softmax(p + b * s, 0),
        "not normalised": lambda p, s, b: s / b + p,
        "log Z normalises": lambda p, s, b: p + s / b - b * torch.logsumexp(p + s / b, 0),
        "overflows": lambda p, s, b: torch.log((w := torch.exp(p) * torch.exp(s / b)) / w.sum()),
    },
    "kl_divergence": {
        "other direction": lambda p, q: F.kl_div(p, q, log_target=True, reduction="sum"),
        "not weighted": lambda p, q: torch.sum(p - q),
        "is nan": lambda p, q: F.kl_div(q, p, log_target=True, reduction="sum"),
        "cross-entropy": lambda p, q: -torch.dot(p.exp(), q),
    },
    "scores_of_policy": {
        "log Z is left out": lambda p, q, z, b: b * p - b * q,
        "not multiplied by beta": lambda p, q, z, b: z + b * (p - q),
        "sign of log Z": lambda p, q, z, b: b * p - b * q - b * z,
        "are swapped": lambda p, q, z, b: b * z - b * (p - q),
    },
    "token_logps": {
        "no shift": lambda x, i: picked(x.log_softmax(-1), i)[:, 1:],
        "shifted the wrong way": lambda x, i: picked(x[:, 1:].log_softmax(-1), i[:, :-1]),
        "over the positions": lambda x, i: picked(torch.log_softmax(x[:, :-1], 1), i[:, 1:]),
        "underflows": lambda x, i: picked(torch.softmax(x, 2)[:, :-1], i[:, 1:]).log(),
        "T columns": lambda x, i: picked(torch.log_softmax(x, 2), i),
    },
    "response_mask": {
        "counted from column 0": lambda i, a, p: a & (torch.arange(a.shape[1]) >= p.unsqueeze(1)),
        "padding after the response": lambda i, a, p: (a.cumsum(1) - 1) >= p.unsqueeze(1),
        "the EOS is lost": lambda i, a, p: mask_loop(i, a, p) & i.ne(0),
        "one token too late": lambda i, a, p: mask_loop(i, a, p + 1),
    },
    "position_ids": {
        "pushes every token along": lambda a: torch.arange(a.shape[1])[None].repeat(len(a), 1),
        "columns with padding at 0": lambda a: torch.arange(a.shape[1])[None].repeat(len(a), 1).masked_fill(~a, 0),
        "at -1": lambda a: a.long().cumsum(-1) - 1,
        "goes on with the last": lambda a: torch.relu(a.long().cumsum(-1) - 1),
    },
    "sequence_logps": {
        "shifted the wrong way": lambda x, i, m: (tokens(x, i) * m[:, :-1]).sum(1),
        "a mean over the response": lambda x, i, m: (tokens(x, i) * m[:, 1:]).sum(1) / m[:, 1:].sum(1),
        "not used": lambda x, i, m: tokens(x, i).sum(1),
        "no shift": lambda x, i, m: (picked(x.log_softmax(-1), i) * m)[:, 1:].sum(1),
        "raw logits": lambda x, i, m: (picked(x[:, :-1], i[:, 1:]) * m[:, 1:]).sum(1),
        "EOS, is dropped": lambda x, i, m: (tokens(x, i) * (m & (m.cumsum(1) < m.sum(1, True)))[:, 1:]).sum(1),
        "turned round: all but": lambda x, i, m: (tokens(x, i) * ~m[:, 1:]).sum(1),
        "a mean over all columns": lambda x, i, m: (tokens(x, i) * m[:, 1:]).mean(1),
        "sign is turned round": lambda x, i, m: -(tokens(x, i) * m[:, 1:]).sum(1),
        "rows are summed": lambda x, i, m: tokens(x, i)[m[:, 1:]].sum(),
        "no gradient": lambda x, i, m: (tokens(x.detach(), i) * m[:, 1:]).sum(1),
    },
}

SECOND = {
    "gumbel_noise": lambda u: -torch.log(torch.log(1 / u)),
    "gumbel_ranking": lambda s, n: torch.sort(-(s + n), dim=1).indices,
    "bradley_terry": lambda c, r, o: -F.softplus(r + o - c),
    "winner_logps": lambda s: s - s.logsumexp(1, keepdim=True),
    "plackett_luce": lambda s: places(s).sum(0),
    "first_places": lambda s, m: places(s)[:m].sum(0),
    "log_partition": lambda p, s, b: s.max() / b + torch.log((p.exp() * torch.exp((s - s.max()) / b)).sum()),
    "optimal_policy": lambda p, s, b: (x := p + (s - s.max()) / b) - torch.log(torch.exp(x).sum()),
    "kl_divergence": lambda p, q: F.kl_div(q, p.exp(), reduction="sum"),
    "scores_of_policy": lambda p, q, z, b: torch.stack([b * (x - y) + b * z for x, y in zip(p, q, strict=True)]),
    "token_logps": tokens,
    "response_mask": mask_loop,
    "position_ids": positions_loop,
    "sequence_logps": lambda x, i, m: (tokens(x, i) * m[:, 1:]).sum(1),
}
