import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, Qwen2Config

from pdpo import trees
from pdpo.encoding import Encoded
from pdpo.training import Row, TrainConfig, fastest_logps, policy_logps, row_losses, shared_policy_logps, train
from pdpo.trees import ancestor_mask, build_tree, tree_logps

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "llama": LlamaConfig(vocab_size=50, max_position_embeddings=64, num_key_value_heads=2, **SIZES),
    "qwen2": Qwen2Config(vocab_size=50, max_position_embeddings=64, num_key_value_heads=2, **SIZES),
}


def random_policy(kind="gpt2", attention="sdpa", seed=0):
    config = CONFIGS[kind] if isinstance(kind, str) else kind
    config.eos_token_id, config.bos_token_id, config.initializer_range = 0, 0, 0.2
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def random_rows(num_rows=5, num_responses=2, seed=0):
    """Rows with one template, responses that share first words, an equal pair of responses and a repeated prompt."""
    generator = torch.Generator().manual_seed(seed)

    def some(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, 50, (length,), generator=generator).tolist()

    template, rows = some(4, 5), []
    for i in range(num_rows):
        prompt = template + some(1, 6) if i != 2 else rows[0].sequences[0].input_ids[: rows[0].sequences[0].num_prompt]
        first_words = some(0, 3)
        responses = [first_words + some(1, 6) + [0] for _ in range(num_responses)]
        rows.append(Row(tuple(Encoded(prompt + each, len(prompt)) for each in responses), 0.1 * i))
    rows.append(Row((rows[0].sequences[0],) * num_responses))
    reference = torch.randn(len(rows), num_responses, generator=generator).tolist()
    return [Row(row.sequences, row.offset, tuple(values)) for row, values in zip(rows, reference, strict=True)]


def losses_and_gradients(policy, rows, config, logps_of):
    policy.zero_grad()
    losses = row_losses(policy, rows, config, logps_of=logps_of)[0]
    losses.sum().backward()
    return losses.detach(), [each.grad.clone() for each in policy.parameters()]


def test_a_tree_by_hand():
    #   1 2 3 4    prompt 1 2, response 3 4         tree:  0:1 - 1:2 - 2:3 - 3:4
    #   1 2 5      prompt 1 2, response 5                            \ 4:5
    #   6 7        prompt 6, response 7                    5:6 - 6:7
    tree = build_tree([Encoded([1, 2, 3, 4], 2), Encoded([1, 2, 5], 2), Encoded([6, 7], 1)])
    assert tree.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert tree.heads.tolist() == [1, 2, 5]  # token 1 predicts two edges and is projected once
    assert tree.edge_tokens.tolist() == [3, 4, 5, 7]
    assert tree.edge_heads.tolist() == [0, 1, 0, 2]
    assert tree.paths.tolist() == [[0, 1], [2, 4], [3, 4]]  # 4: nothing
    seen = [row.nonzero().flatten().tolist() for row in ancestor_mask(tree.ends)[0]]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5], [5, 6]]


def test_two_trees_side_by_side_by_hand():
    #   the sequences of the test above: 1 2 3 4, filled up to the length of the other tree;  1 2 5 and 6 7
    tree = build_tree([Encoded([1, 2, 3, 4], 2), Encoded([1, 2, 5], 2), Encoded([6, 7], 1)], max_tokens=4)
    assert tree.input_ids.tolist() == [[1, 2, 3, 4, 0], [1, 2, 5, 6, 7]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert tree.heads.tolist() == [1, 2, 6, 8] and tree.edge_heads.tolist() == [0, 1, 2, 3]
    assert tree.paths.tolist() == [[0, 1], [2, 4], [3, 4]]
    seen = [[row.nonzero().flatten().tolist() for row in of_tree] for of_tree in ancestor_mask(tree.ends)]
    assert seen == [[[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4]], [[0], [0, 1], [0, 1, 2], [3], [3, 4]]]
    filled = build_tree([Encoded([1, 2, 3, 4], 2), Encoded([6, 7], 1)], max_tokens=3).ends
    seen = [row.nonzero().flatten().tolist() for row in ancestor_mask(filled)[1]]
    assert seen == [[0], [0, 1], [2], [3]]  # what fills a tree up sees itself alone


@pytest.mark.parametrize(
    "kind, attention, method, num_responses",
    [
        ("gpt2", "sdpa", "dpo", 2),
        ("gpt2", "eager", "plackett_luce", 4),
        ("llama", "sdpa", "sft", 1),
        ("llama", "eager", "dpo", 2),
        ("qwen2", "sdpa", "plackett_luce", 4),
    ],
)
def test_trees_give_the_plain_logps_losses_and_gradients(kind, attention, method, num_responses):
    policy, rows = random_policy(kind, attention), random_rows(num_responses=num_responses)
    torch.testing.assert_close(shared_policy_logps(policy, rows), policy_logps(policy, rows), rtol=0, atol=1e-4)
    config = TrainConfig(method, 1, len(rows), 1e-3, beta=None if method == "sft" else 0.3)
    fast, fast_gradients = losses_and_gradients(policy, rows, config, shared_policy_logps)
    plain, plain_gradients = losses_and_gradients(policy, rows, config, policy_logps)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4)
    assert len(fast_gradients) > 10
    for mine, expected in zip(fast_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    assert fastest_logps(policy, rows) is shared_policy_logps


def causal_mask(ends):
    return torch.ones(len(ends), ends.shape[1], ends.shape[1], dtype=torch.bool).tril()


def unbroken_positions(sequences, **options):
    tree = build_tree(sequences, **options)
    return tree._replace(position_ids=torch.arange(tree.input_ids.shape[1]).expand(tree.input_ids.shape))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])  # learned and rotary positions
def test_each_part_of_the_layout_is_needed(monkeypatch, kind):
    policy, rows = random_policy(kind), random_rows(num_rows=2)[:2]
    sequences = [each for row in rows for each in row.sequences]
    expected = policy_logps(policy, rows).flatten()

    def error(policy):
        return float((tree_logps(policy, sequences) - expected).detach().abs().max())

    assert error(policy) < 1e-4
    forward = policy.base_model.forward
    monkeypatch.setattr(policy.base_model, "forward", lambda attention_mask, **inputs: forward(**inputs))
    assert error(policy) > 0.1
    monkeypatch.undo()
    monkeypatch.setattr(trees, "ancestor_mask", causal_mask)
    assert error(policy) > 0.1
    monkeypatch.undo()
    monkeypatch.setattr(trees, "build_tree", unbroken_positions)
    assert error(policy) > 0.1


def test_what_is_shared_is_laid_out_once_and_no_tree_is_much_larger_than_the_budget(monkeypatch):
    policy, rows = random_policy(), random_rows(num_rows=16)
    sequences = [each for row in rows for each in row.sequences]
    shapes = []

    def counted(sequences, **options):
        tree = build_tree(sequences, **options)
        shapes.append(tuple(tree.input_ids.shape))
        return tree

    monkeypatch.setattr(trees, "build_tree", counted)
    whole = tree_logps(policy, sequences, max_tokens=1000)
    size = len({tuple(each.input_ids[: i + 1]) for each in sequences for i in range(len(each.input_ids))})
    assert shapes == [(1, size)]
    assert size > policy.config.n_positions  # a tree may be longer than the context: positions are depths
    longest = max(len(each.input_ids) for each in sequences)
    for budget in (1, 20, 40):
        cut = tree_logps(policy, sequences, max_tokens=budget)
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-4)
        num_trees, width = shapes[-1]
        assert num_trees > 1 and width <= budget + longest


def test_policies_that_take_no_tree_run_on_the_plain_path_and_it_is_said(capsys):
    rows = random_rows()
    alibi = random_policy(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4), "eager")
    assert fastest_logps(alibi, rows) is policy_logps
    assert "padded batches, not on token trees" in capsys.readouterr().out
    history = train(alibi, rows, TrainConfig("dpo", 2, 2, 1e-3, beta=0.3), show_progress=False)
    assert len(history) == 3
    flash = random_policy()
    flash.config._attn_implementation_internal = "flash_attention_2"
    assert "takes no mask" in trees.supports_trees(flash, [rows[0].sequences[0]], torch.zeros(1))
    wrong = random_policy()
    assert "differ by" in trees.supports_trees(wrong, [rows[0].sequences[0]], torch.zeros(1))


def test_running_out_of_memory_is_no_reason_to_leave_the_trees(monkeypatch):
    def no_memory(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trees, "tree_logps", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fastest_logps(random_policy(), random_rows())


@pytest.mark.parametrize("num_prompt", [0, 3])
def test_a_sequence_without_prompt_or_response_is_named(num_prompt):
    with pytest.raises(ValueError, match=r"sequences \[1\] need"):
        tree_logps(random_policy(), [Encoded([1, 2, 3], 1), Encoded([1, 2, 3], num_prompt)])
