"""The fast path: a batch as token trees, so that what sequences share (template, prompt, first words) is computed once.

A tree lies in memory as a row of tokens in depth-first order. A token's position id is its depth, and it attends to its
ancestors alone: a token sees exactly what it would see in its own sequence, and `tree_logps` equals the plain path
(`training.policy_logps`) but for rounding. What it saves grows with what is shared: much for long prompts with short
responses, little for the reverse. Only positions that predict a scored token meet the vocabulary."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pdpo.encoding import Encoded


class Tree(NamedTuple):
    """R sequences as T trees of up to N tokens, E of which (the edges) are scored by at least one sequence. All are int64.

    Shorter trees are filled up with tokens that see themselves alone."""

    input_ids: Tensor  # (T, N)
    position_ids: Tensor  # (T, N): a token's position is its depth
    ends: Tensor  # (T, N): tokens j + 1 .. ends[j] - 1 of a row are the descendants of its token j
    heads: Tensor  # (P,): the positions, of T * N, that predict an edge's token, each once
    edge_heads: Tensor  # (E,): where in `heads` an edge is predicted
    edge_tokens: Tensor  # (E,): the edge's token
    paths: Tensor  # (R, L): the edges that each sequence sums over; E where a sequence has fewer than L


def build_tree(sequences: list[Encoded], *, max_tokens: int | None = None) -> Tree:
    """A tree of sequences that are sorted by their tokens: each branches off the one before it. Of more than max_tokens it takes
    as many trees as are needed, about equally large."""
    follow = [0] + [shared_length(one.input_ids, other.input_ids) for one, other in itertools.pairwise(sequences)]
    size = sum(len(ids) for ids, _ in sequences) - sum(follow)
    even = size / math.ceil(size / (max_tokens or size))
    tokens, depths, parents, ends, starts, scored = [], [], [], [], [], []  # nodes of all trees, numbered as they come
    path, laid = [], 0  # the nodes along the last sequence; tokens so far, each once
    for (ids, num_prompt), shared in zip(sequences, follow, strict=True):
        laid += len(ids) - shared
        if laid - (len(ids) - shared) / 2 >= len(starts) * even:
            starts.append(len(tokens))
            shared = 0
        path = path[:shared] + list(range(len(tokens), len(tokens) + len(ids) - shared))
        tokens += ids[shared:]
        depths += range(shared, len(ids))
        parents += ([-1] + path)[shared : len(ids)]
        ends += [0] * (len(ids) - shared)
        for node in path:
            ends[node] = len(tokens)
        scored.append(path[num_prompt:])
    edges = {node: edge for edge, node in enumerate(sorted({node for nodes in scored for node in nodes}))}
    longest = max(map(len, scored))
    paths = [[edges[node] for node in nodes] + [len(edges)] * (longest - len(nodes)) for nodes in scored]
    heads, edge_heads = torch.tensor([parents[node] for node in edges]).unique(return_inverse=True)
    edge_tokens = torch.tensor([tokens[node] for node in edges])

    sizes = torch.tensor([*starts, len(tokens)]).diff()  # (T,)
    starts, row = torch.tensor(starts).repeat_interleave(sizes), torch.arange(len(sizes)).repeat_interleave(sizes)
    width = int(sizes.max())
    place = torch.arange(len(tokens)) - starts + row * width  # of each node among the T * N
    laid = torch.stack(
        [torch.zeros(len(sizes), width, dtype=torch.int64)] * 2 + [torch.arange(1, width + 1).expand(len(sizes), -1)]
    )
    laid.view(3, -1)[:, place] = torch.stack([torch.tensor(tokens), torch.tensor(depths), torch.tensor(ends) - starts])
    return Tree(*laid, place[heads], edge_heads, edge_tokens, torch.tensor(paths))


def shared_length(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def ancestor_mask(ends: Tensor) -> Tensor:
    """(T, N) -> (T, N, N) bool: row i is True at token i itself and at its ancestors. Sequences side by side do not meet."""
    node = torch.arange(ends.shape[1], device=ends.device)
    return (node[:, None] >= node) & (node[:, None] < ends[:, None])


def next_token_logps(logits: Tensor, hidden: Tensor, heads: Tensor, tokens: Tensor) -> Tensor:
    """(E, 1) nats: the log-probability of each token where it is predicted."""
    return logits.log_softmax(-1)[heads, tokens][:, None]


def tree_logps(policy, sequences: list[Encoded], *, max_tokens: int | None = None) -> Tensor:
    """(R,) float32 nats: the log-probability of every response, as `sequence_logps` gives it, with the gradient.

    Args: policy, sequences: a model that `supports_trees`; R encoded responses in any order; equal ones cost nothing.
          max_tokens: about those of one tree; where there are more, there are further trees beside it. None is twice the policy's width:
              attention grows with the square, and smaller trees share less."""
    return tree_tokens(policy, sequences, max_tokens=max_tokens)[..., 0].sum(1)  # (R,)


def tree_tokens(
    policy, sequences: list[Encoded], *, measure: Callable = next_token_logps, max_tokens: int | None = None
) -> Tensor:
    """(R, L, C) what `measure` finds at each token of each response, 0 past its end; as `tree_logps`, but not summed.

    Args: measure: of (P, V) float32 logits, (P, D) last hidden states, (E,) indices into both and (E,) tokens makes (E, C)."""
    empty = [i for i, (ids, num_prompt) in enumerate(sequences) if not 0 < num_prompt < len(ids)]
    if empty:
        raise ValueError(f"tree_logps: sequences {empty} need at least one prompt token and one response token to score.")
    device = next(policy.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].input_ids)
    tree = build_tree([sequences[i] for i in order], max_tokens=max_tokens or 2 * policy.config.hidden_size)
    tree = Tree(*(each.to(device, non_blocking=True) for each in tree))
    mask = ancestor_mask(tree.ends)[:, None]  # (T, 1, N, N): a mask of four dimensions is taken as it is
    if policy.config._attn_implementation == "eager":  # adds its mask; SDPA takes booleans
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else policy.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)
    # never position ids without a mask: transformers would take the resets for packed documents and hide the prompt
    inputs = {"input_ids": tree.input_ids, "attention_mask": mask, "position_ids": tree.position_ids, "use_cache": False}
    hidden = policy.base_model(**inputs).last_hidden_state.flatten(0, 1)[tree.heads]  # (P, D)
    logits = policy.get_output_embeddings()(hidden).float()  # (P, V)
    edges = measure(logits, hidden, tree.edge_heads, tree.edge_tokens)  # (E, C)
    found = torch.cat([edges, edges.new_zeros(1, edges.shape[1])])[tree.paths]  # (R, L, C)
    return found[torch.tensor(order, device=device).argsort()]


@torch.no_grad()
def supports_trees(policy, sequences: list[Encoded], expected: Tensor) -> str:
    """Why this policy cannot be run on trees, or "" where it can: it is tried in float32, not looked up in a list.

    Args: sequences: a few to try, best with something in common; expected: (R,) their log-probabilities by the plain path."""
    if policy.config._attn_implementation not in ("sdpa", "eager"):
        return f"attention {policy.config._attn_implementation!r} takes no mask"
    try:
        difference = float((tree_logps(policy, sequences) - expected).abs().max())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models of other kinds refuse a mask of four dimensions in their own ways
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if difference < 1e-3 else f"log-probabilities differ by {difference:.1g} nats"
