r"""The fast path: a batch as token trees, so that what sequences share (template, prompt, first words) is computed once.

A tree lies in memory as one row of tokens in depth-first order. A token's position id is its depth, and it attends to its
ancestors alone: a token sees exactly what it would see in its own sequence, and `tree_logps` equals the plain path
(`training.policy_logps`) but for rounding. What it saves grows with what is shared: much for long prompts with short
responses, little for the reverse. No token is padding, and only positions that predict a scored token meet the vocabulary."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pdpo.encoding import Encoded


class Tree(NamedTuple):
    """R sequences as one tree of N tokens, E of which (the edges) are scored by at least one sequence. All are int64."""

    input_ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N): a token's position is its depth
    ends: Tensor  # (N,): tokens j + 1 .. ends[j] - 1 are the descendants of token j
    heads: Tensor  # (P,): the positions that predict an edge's token, each once
    edge_heads: Tensor  # (E,): where in `heads` an edge is predicted
    edge_tokens: Tensor  # (E,): the edge's token
    paths: Tensor  # (R, L): the edges that each sequence sums over; E where a sequence has fewer than L


def build_tree(sequences: list[Encoded]) -> Tree:
    """One tree of sequences that are sorted by their tokens: each then branches off the one before it."""
    tokens, depths, parents, ends, scored = [], [], [], [], []
    previous, path = [], []  # path: the tree's tokens along the last sequence
    for ids, num_prompt in sequences:
        shared = shared_length(previous, ids)
        path = path[:shared] + list(range(len(tokens), len(tokens) + len(ids) - shared))
        tokens += ids[shared:]
        depths += range(shared, len(ids))
        parents += ([-1] + path)[shared : len(ids)]
        ends += [0] * (len(ids) - shared)
        for node in path:
            ends[node] = len(tokens)
        scored.append(path[num_prompt:])
        previous = ids
    edges = {node: edge for edge, node in enumerate(sorted({node for nodes in scored for node in nodes}))}
    longest = max(map(len, scored))
    paths = [[edges[node] for node in nodes] + [len(edges)] * (longest - len(nodes)) for nodes in scored]
    heads, edge_heads = torch.tensor([parents[node] for node in edges]).unique(return_inverse=True)
    edge_tokens = torch.tensor([tokens[node] for node in edges])
    return Tree(
        *(torch.tensor([tokens]), torch.tensor([depths]), torch.tensor(ends)), heads, edge_heads, edge_tokens, torch.tensor(paths)
    )  # fmt: skip


def shared_length(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def ancestor_mask(ends: Tensor) -> Tensor:
    """(N,) -> (N, N) bool: row i is True at token i itself and at its ancestors. Sequences side by side do not meet."""
    node = torch.arange(len(ends), device=ends.device)
    return (node[:, None] >= node) & (node[:, None] < ends)


def next_token_logps(logits: Tensor, hidden: Tensor, heads: Tensor, tokens: Tensor) -> Tensor:
    """(E, 1) nats: the log-probability of each token where it is predicted."""
    return logits.log_softmax(-1)[heads, tokens][:, None]


def tree_logps(policy, sequences: list[Encoded], *, max_tokens: int | None = None) -> Tensor:
    """(R,) float32 nats: the log-probability of every response, as `sequence_logps` gives it, with the gradient.

    Args: policy, sequences: a model that `supports_trees`; R encoded responses in any order; equal ones cost nothing.
          max_tokens: of one tree; where there are more, further trees are run one after another. None is four times the
              policy's width, at which attention, which grows with the square, takes up to two fifths of the work."""
    return tree_tokens(policy, sequences, max_tokens=max_tokens)[..., 0].sum(1)  # (R,)


def tree_tokens(
    policy, sequences: list[Encoded], *, measure: Callable = next_token_logps, max_tokens: int | None = None
) -> Tensor:
    """(R, L, C) what `measure` finds at each token of each response, 0 past its end; as `tree_logps`, but not summed.

    Args: measure: of (P, V) float32 logits, (P, D) last hidden states, (E,) indices into both and (E,) tokens makes (E, C)."""
    empty = [i for i, (ids, num_prompt) in enumerate(sequences) if not 0 < num_prompt < len(ids)]
    if empty:
        raise ValueError(f"tree_logps: sequences {empty} need at least one prompt token and one response token to score.")
    max_tokens = max_tokens or 4 * policy.config.hidden_size
    device = next(policy.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].input_ids)
    trees = map(build_tree, _parts([sequences[i] for i in order], max_tokens))
    found = [_one_tree(policy, Tree(*(each.to(device, non_blocking=True) for each in tree)), measure) for tree in trees]
    longest = max(each.shape[1] for each in found)
    found = [torch.nn.functional.pad(each, (0, 0, 0, longest - each.shape[1])) for each in found]
    return torch.cat(found)[torch.tensor(order, device=device).argsort()]


def _parts(ordered: list[Encoded], max_tokens: int) -> list[list[Encoded]]:
    """Cuts sorted sequences into runs whose trees have at most max_tokens tokens (at least one sequence a run)."""
    parts: list[list[Encoded]] = []
    size = 0
    for sequence in ordered:
        added = len(sequence.input_ids) - (shared_length(parts[-1][-1].input_ids, sequence.input_ids) if parts else 0)
        if not parts or size + added > max_tokens:
            parts.append([])
            size, added = 0, len(sequence.input_ids)
        parts[-1].append(sequence)
        size += added
    return parts


def _one_tree(policy, tree: Tree, measure: Callable) -> Tensor:
    mask = ancestor_mask(tree.ends)[None, None]  # (1, 1, N, N): a mask of four dimensions is taken as it is
    if policy.config._attn_implementation == "eager":  # adds its mask; SDPA takes booleans
        dtype = torch.get_autocast_dtype(mask.device.type) if torch.is_autocast_enabled(mask.device.type) else policy.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    # never position ids without a mask: transformers would take the resets for packed documents and hide the prompt
    output = policy(
        input_ids=tree.input_ids, attention_mask=mask, position_ids=tree.position_ids, logits_to_keep=tree.heads,
        use_cache=False, output_hidden_states=measure is not next_token_logps,
    )  # fmt: skip
    hidden = output.hidden_states[-1][0, tree.heads] if output.hidden_states else None  # (P, D)
    edges = measure(output.logits[0].float(), hidden, tree.edge_heads, tree.edge_tokens)  # (E, C)
    return torch.cat([edges, edges.new_zeros(1, edges.shape[1])])[tree.paths]  # (R, L, C)


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
