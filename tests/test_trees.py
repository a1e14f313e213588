"""Token trees against the plain path: the same log-probabilities, losses and gradients, each token computed once."""

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
    "bloom": BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4),
}


def random_policy(kind="gpt2", attention="sdpa"):
    config = CONFIGS[kind]
    config.eos_token_id, config.bos_token_id, config.initializer_range = 0, 0, 0.2
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def random_rows(num_rows=5, num_responses=2):
    """Rows with one template, responses that share first words, an equal pair of responses and a repeated prompt."""
    generator = torch.Generator().manual_seed(0)

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


@pytest.mark.parametrize(
    "kind, attention, method, num_responses",
    [("gpt2", "sdpa", "dpo", 2), ("llama", "eager", "plackett_luce", 4), ("qwen2", "sdpa", "sft", 1)],
)
def test_trees_give_the_plain_logps_losses_and_gradients(kind, attention, method, num_responses):
    policy, rows = random_policy(kind, attention), random_rows(num_responses=num_responses)
    assert fastest_logps(policy, rows) is shared_policy_logps
    torch.testing.assert_close(shared_policy_logps(policy, rows), policy_logps(policy, rows), rtol=0, atol=1e-4)
    config = TrainConfig(method, 1, len(rows), 1e-3, beta=None if method == "sft" else 0.3)
    results = []
    for logps_of in (shared_policy_logps, policy_logps):
        policy.zero_grad()
        losses = row_losses(policy, rows, config, logps_of=logps_of)[0]
        losses.sum().backward()
        results.append([losses.detach(), *(each.grad.clone() for each in policy.parameters())])
    (fast, *fast_gradients), (plain, *gradients) = results
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(fast_gradients, gradients, rtol=1e-4, atol=1e-4)


def test_what_is_shared_is_laid_out_once_and_no_tree_is_much_larger_than_the_budget():
    policy, rows = random_policy(), random_rows(num_rows=16)
    sequences = sorted(each for row in rows for each in row.sequences)
    size = len({tuple(each.input_ids[: i + 1]) for each in sequences for i in range(len(each.input_ids))})
    assert build_tree(sequences).input_ids.shape == (1, size)
    assert size > policy.config.n_positions  # a tree may be longer than the context: positions are depths
    whole, longest = tree_logps(policy, sequences, max_tokens=1000), max(len(each.input_ids) for each in sequences)
    for budget in (1, 20, 40):
        num_trees, width = build_tree(sequences, max_tokens=budget).input_ids.shape
        assert num_trees > 1 and width <= budget + longest
        torch.testing.assert_close(tree_logps(policy, sequences, max_tokens=budget), whole, rtol=0, atol=1e-4)


def test_policies_that_take_no_tree_run_on_the_plain_path_and_it_is_said(capsys):
    rows = random_rows()
    alibi = random_policy("bloom", "eager")
    assert fastest_logps(alibi, rows) is policy_logps
    assert "padded batches, not on token trees" in capsys.readouterr().out
    history = train(alibi, rows, TrainConfig("dpo", 2, 2, 1e-3, beta=0.3), show_progress=False)
    assert len(history) == 3
    flash = random_policy()
    flash.config._attn_implementation_internal = "flash_attention_2"
    assert "takes no mask" in trees.supports_trees(flash, [rows[0].sequences[0]], torch.zeros(1))
    assert "differ by" in trees.supports_trees(random_policy(), [rows[0].sequences[0]], torch.zeros(1))


def test_running_out_of_memory_is_no_reason_to_leave_the_trees(monkeypatch):
    def no_memory(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trees, "tree_logps", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fastest_logps(random_policy(), random_rows())


def test_a_sequence_without_prompt_or_response_is_named():
    with pytest.raises(ValueError, match=r"sequences \[1, 2\] need"):
        tree_logps(random_policy(), [Encoded([1, 2, 3], 1), Encoded([1, 2, 3], 0), Encoded([1, 2, 3], 3)])
