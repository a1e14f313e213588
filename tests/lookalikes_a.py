"""Wrong answers to exercises 01 to 04 that look right, as a student would write them, and a second right answer to each task.

LOOKALIKES: task -> {words that the message must hold: wrong function}; SECOND: task -> right function of another form.
"""

import math

import torch
import torch.nn.functional as F


def standard_deviate(u):
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


def pl_loop(scores, order=range, reduce=torch.sum, first=0):
    terms = [scores[:, k] - torch.logsumexp(scores[:, k + first :], 1) for k in order(scores.shape[1] - first)]
    return reduce(torch.stack(terms, 1), 1)


def pl_product(scores):
    probability = torch.ones(len(scores))
    for k in range(scores.shape[1]):
        weights = torch.exp(scores[:, k:])
        probability = probability * weights[:, 0] / weights.sum(1)
    return torch.log(probability)


def pl_growing(scores):
    return sum(scores[:, k] - torch.logsumexp(scores[:, : k + 1], 1) for k in range(scores.shape[1]))


def pl_pairs(scores):
    total = torch.zeros(len(scores))
    for k in range(scores.shape[1] - 1):
        total = total + F.logsigmoid(scores[:, k] - scores[:, k + 1])
    return total


def first_loop(scores, m, stop=0):
    left, total = scores, 0.0
    for _ in range(m + stop):
        total = total + left[:, 0] - left.logsumexp(1)
        left = left[:, 1:]
    return total


def first_among(scores, m):
    return pl_loop(scores[:, :m]) if m > 1 else torch.zeros(len(scores)) + 0 * scores[:, 0]


def tilt(p, s, beta):
    weights = torch.exp(p) * torch.exp(s / beta)
    return torch.log(weights / weights.sum())


def cross_entropies(logits, ids):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def token_loop(logits, ids, shift=1, normalise=torch.log_softmax):
    rows = []
    for b in range(len(ids)):
        log_probs = normalise(logits[b], -1)
        rows.append(torch.stack([log_probs[t - shift, ids[b, t]] for t in range(1, ids.shape[1])]))
    return torch.stack(rows)


def no_softmax(logits, _):
    return logits


def masked_loop(logits, ids, mask, *, look=0, mean=False, drop_last=False, shift=1, normalise=torch.log_softmax):
    rows = []
    for b in range(len(ids)):
        log_probs = normalise(logits[b], -1)
        where = [t for t in range(1, ids.shape[1]) if mask[b, t + look]]
        where = where[:-1] if drop_last else where
        terms = [log_probs[t - shift, ids[b, t]] for t in where]
        total = torch.stack(terms).sum() if terms else 0 * logits.sum()
        rows.append(total / len(terms) if mean else total)
    return torch.stack(rows)


def mask_loop(ids, attention, prompt, *, keep_prompt=0, drop=None):
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for b in range(len(ids)):
        columns = [t for t in range(ids.shape[1]) if attention[b, t]]
        mask[b, columns[int(prompt[b]) - keep_prompt : drop]] = True
    return mask


def mask_from_columns(ids, attention, prompt):
    mask = attention.clone()
    for b, n in enumerate(prompt.tolist()):
        mask[b, :n] = False
    return mask


def positions_loop(attention, start=0, padding=0):
    rows = torch.full(attention.shape, padding)
    for b, row in enumerate(attention):
        rows[b, row] = torch.arange(start, start + int(row.sum()))
    return rows


LOOKALIKES = {
    "gumbel_noise": {
        "one more logarithm": lambda u: torch.log(1 / u),
        "a minus is missing": lambda u: torch.log(torch.log(1 / u)),
        "1 - u in place of u": lambda u: -torch.log(-torch.log1p(-u)),
        "logistic": lambda u: torch.log(u / (1 - u)),
        "F itself": lambda u: 1 / torch.exp(1 / u.exp()),
        "none of the usual": standard_deviate,
        "off by the same": lambda u: -torch.log(-torch.log(u)) - 0.5772157,
    },
    "gumbel_ranking": {
        "ascending": lambda s, n: torch.argsort(s + n, dim=1),
        "ranks": lambda s, n: torch.argsort(torch.argsort(-(s + n), dim=1), dim=1),
        "noise is left out": lambda s, n: torch.argsort(-s, dim=1, stable=True),
        "noise is subtracted": lambda s, n: torch.argsort(n - s, dim=1),
        "noisy scores are returned": lambda s, n: torch.topk(s + n, s.shape[1], dim=1).values,
        "only the winner": lambda s, n: torch.max(s + n, dim=1).indices,
        "down the batch": lambda s, n: torch.sort(s + n, dim=0, descending=True).indices,
    },
    "bradley_terry": {
        "offset is added": lambda c, r, o: -F.softplus(r - c - o),
        "offset is left out": lambda c, r, o: -F.softplus(r - c),
        "outside the sigmoid": lambda c, r, o: F.logsigmoid(c - r) - o,
        "swapped": lambda c, r, o: F.logsigmoid(r - (c + o)),
        "underflows": lambda c, r, o: torch.log(1 / (1 + torch.exp(-(c - r - o)))),
        "logarithm is missing": lambda c, r, o: 1 / (1 + torch.exp(-(c - r - o))),
        "sign is turned round": lambda c, r, o: F.softplus(-(c - r - o)),
        "rows are averaged": lambda c, r, o: F.logsigmoid(c - r - o).mean(),
        "no gradient": lambda c, r, o: F.logsigmoid((c - r - o).data),
    },
    "winner_logps": {
        "exp of large scores overflows": lambda s: torch.log(torch.exp(s) / torch.exp(s).sum(1, keepdim=True)),
        "the softmax underflows": lambda s: torch.log(torch.softmax(s, 1)),
        "largest of the batch": lambda s: (x := s - s.max()) - torch.log(torch.exp(x).sum(1, keepdim=True)),
        "inside the sum only": lambda s: s - torch.log(torch.exp(s - s.amax(1, keepdim=True)).sum(1, keepdim=True)),
        "down the batch": lambda s: torch.log_softmax(s, 0),
        "hides the underflow": lambda s: torch.log(torch.softmax(s, 1) + 1e-10),
        "logarithm is missing": lambda s: torch.softmax(s, 1),
    },
    "plackett_luce": {
        "already must be taken out": lambda s: sum(torch.log_softmax(s, 1)[:, k] for k in range(s.shape[1])),
        "the worst is chosen first": pl_growing,
        "a mean over the K places": lambda s: pl_loop(s, reduce=torch.mean),
        "only who wins": lambda s: s[:, 0] - torch.logsumexp(s, 1),
        "compared in pairs": pl_pairs,
        "overflows or underflows": pl_product,
        "begins at k itself": lambda s: pl_loop(s, first=1),
        "sign is turned round": lambda s: -pl_loop(s),
        "logarithm is missing": lambda s: pl_loop(s).exp(),
        "rows are averaged": lambda s: pl_loop(s).mean(),
    },
    "first_places": {
        "the rest is thrown away": first_among,
        "an order nobody gave": lambda s, m: pl_loop(s),
        "who is placed must be taken out": lambda s, m: (s - s.logsumexp(1, keepdim=True))[:, :m].sum(1),
        "the first m as a set": lambda s, m: torch.softmax(s - s.amax(1, True), 1)[:, :m].sum(1).log(),
        "only place m": lambda s, m: s[:, m - 1] - torch.logsumexp(s[:, m - 1 :], 1),
        "one place too few": lambda s, m: first_loop(s, m, stop=-1) + 0 * s.sum(1),
    },
    "log_partition": {
        "the reference is left out": lambda p, s, b: torch.logsumexp(s / b, 0),
        "beta multiplies": lambda p, s, b: torch.logsumexp(p + b * s, 0),
        "divided by N": lambda p, s, b: torch.logsumexp(p + s / b, 0) - torch.log(torch.tensor(float(len(s)))),
        "the mean score": lambda p, s, b: torch.dot(p.exp(), s) / b,
        "beta log Z": lambda p, s, b: b * torch.logsumexp(p + s / b, 0),
        "overflows": lambda p, s, b: torch.log(torch.dot(torch.exp(p), torch.exp(s / b))),
        "logarithm is missing": lambda p, s, b: torch.exp(p + s / b).sum(),
    },
    "optimal_policy": {
        "so it divides": lambda p, s, b: torch.log_softmax(p + b * s, 0),
        "not normalised": lambda p, s, b: s / b + p,
        "for a uniform one": lambda p, s, b: s / b - torch.logsumexp(s / b, 0),
        "divided by beta, too": lambda p, s, b: torch.log_softmax((s + p) / b, 0),
        "only when beta = 1": lambda p, s, b: torch.log_softmax(s + p, 0),
        "log Z normalises": lambda p, s, b: p + s / b - b * torch.logsumexp(p + s / b, 0),
        "overflows": tilt,
        "logarithm is missing": lambda p, s, b: torch.softmax(p + s / b, 0),
        "off by the same": lambda p, s, b: torch.log_softmax(p + s / b, 0) - math.log(2),
    },
    "kl_divergence": {
        "other direction": lambda p, q: F.kl_div(p, q, log_target=True, reduction="sum"),
        "under q, of log p": lambda p, q: torch.dot(q.exp(), p - q),
        "not weighted": lambda p, q: torch.sum(p - q),
        "is nan": lambda p, q: F.kl_div(q, p, log_target=True, reduction="sum"),
        "cross-entropy": lambda p, q: -torch.dot(p.exp(), q),
        "a weighted sum": lambda p, q: (p.exp() * (p.clamp(min=-1e30) - q)).mean(),
        "sign is turned round": lambda p, q: (p.exp() * (q - p.clamp(min=-1e30))).sum(),
    },
    "scores_of_policy": {
        "log Z is left out": lambda p, q, z, b: b * p - b * q,
        "not multiplied by beta": lambda p, q, z, b: z + b * (p - q),
        "sign of log Z": lambda p, q, z, b: b * p - b * q - b * z,
        "divided by beta": lambda p, q, z, b: (z + p - q) / b,
        "are swapped": lambda p, q, z, b: b * z - b * (p - q),
        "reference is left out": lambda p, q, z, b: b * p + b * z,
    },
    "token_logps": {
        "no shift": lambda x, i: x.log_softmax(-1)[:, 1:].gather(2, i[:, 1:].unsqueeze(-1)).squeeze(-1),
        "shifted the wrong way": lambda x, i: x[:, 1:].log_softmax(-1).gather(2, i[:, :-1].unsqueeze(-1)).squeeze(-1),
        "raw logits": lambda x, i: token_loop(x, i, normalise=no_softmax),
        "over the positions": lambda x, i: torch.log_softmax(x[:, :-1], 1).gather(2, i[:, 1:, None])[..., 0],
        "underflows": lambda x, i: token_loop(x, i, normalise=torch.softmax).log(),
        "T columns": lambda x, i: torch.log_softmax(x, 2).gather(2, i[..., None])[..., 0],
        "sign is turned round": cross_entropies,
        "logarithm is missing": lambda x, i: token_loop(x, i, normalise=torch.softmax),
    },
    "response_mask": {
        "counted from column 0": mask_from_columns,
        "padding after the response": lambda i, a, p: (a.cumsum(1) - 1) >= p.unsqueeze(1),
        "the EOS is lost": lambda i, a, p: mask_loop(i, a, p) & i.ne(0),
        "one token too late": lambda i, a, p: mask_loop(i, a, p, keep_prompt=-1),
        "one token too early": lambda i, a, p: mask_loop(i, a, p, keep_prompt=1),
        "this is the prompt": lambda i, a, p: mask_loop(i, a, p) ^ a,
        "this is attention_mask": lambda i, a, p: a & True,
    },
    "position_ids": {
        "pushes every token along": lambda a: torch.arange(a.shape[1])[None].repeat(len(a), 1),
        "columns with padding at 0": lambda a: torch.arange(a.shape[1])[None].repeat(len(a), 1).masked_fill(~a, 0),
        "counting begins at 1": lambda a: positions_loop(a, start=1),
        "at -1": lambda a: a.long().cumsum(-1) - 1,
        "goes on with the last": lambda a: torch.relu(a.long().cumsum(-1) - 1),
        "from the end": lambda a: (a.sum(1, keepdim=True) - a.cumsum(1)) * a,
    },
    "sequence_logps": {
        "shifted the wrong way": lambda x, i, m: (token_loop(x, i) * m[:, :-1]).sum(1),
        "a mean over the response": lambda x, i, m: masked_loop(x, i, m, mean=True),
        "not used": lambda x, i, m: -cross_entropies(x, i).sum(1),
        "no shift": lambda x, i, m: masked_loop(x, i, m, shift=0),
        "raw logits": lambda x, i, m: masked_loop(x, i, m, normalise=no_softmax),
        "EOS, is dropped": lambda x, i, m: masked_loop(x, i, m, drop_last=True),
        "turned round: all but": lambda x, i, m: -(cross_entropies(x, i) * ~m[:, 1:]).sum(1),
        "a mean over all columns": lambda x, i, m: (token_loop(x, i) * m[:, 1:]).mean(1),
        "sign is turned round": lambda x, i, m: (cross_entropies(x, i) * m[:, 1:]).sum(1),
        "rows are summed": lambda x, i, m: -cross_entropies(x, i)[m[:, 1:]].sum(),
        "no gradient": lambda x, i, m: masked_loop(x.detach(), i, m),
    },
}

SECOND = {
    "gumbel_noise": lambda u: -torch.log(torch.log(1 / u)),
    "gumbel_ranking": lambda s, n: torch.sort(-(s + n), dim=1).indices,
    "bradley_terry": lambda c, r, o: -F.softplus(r + o - c),
    "winner_logps": lambda s: s - s.logsumexp(1, keepdim=True),
    "plackett_luce": pl_loop,
    "first_places": first_loop,
    "log_partition": lambda p, s, b: s.max() / b + torch.log((p.exp() * torch.exp((s - s.max()) / b)).sum()),
    "optimal_policy": lambda p, s, b: (x := p + (s - s.max()) / b) - torch.log(torch.exp(x).sum()),
    "kl_divergence": lambda p, q: F.kl_div(q, p.exp(), reduction="sum"),
    "scores_of_policy": lambda p, q, z, b: torch.stack([b * (x - y) + b * z for x, y in zip(p, q, strict=True)]),
    "token_logps": lambda x, i: -cross_entropies(x, i),
    "response_mask": mask_loop,
    "position_ids": positions_loop,
    "sequence_logps": masked_loop,
}
