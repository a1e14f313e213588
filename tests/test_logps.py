"""Log-probabilities of tokens and responses against torch, a slow loop and transformers' own loss."""

import math

import pytest
import torch

from pdpo.logps import sequence_logps, token_logps

EOS = 0  # GPT-2 has no pad token: it pads with its EOS


def batch(*, b: int = 3, t: int = 6, v: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(b, t, v, generator=generator), torch.randint(v, (b, t), generator=generator)


@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    config = dict(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, initializer_range=0.5)).eval()
    return model


@pytest.fixture
def padded():
    """Two prompts with responses that end in EOS, padded on the right with EOS: ids, real tokens, response tokens."""
    ids = torch.tensor([[3, 4, 5, 6, EOS, EOS, EOS], [7, 2, 9, 8, 1, 10, EOS]])
    real = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    response = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    return ids, real, response


# token_logps


def test_token_logps_equal_hand_worked_numbers():
    # after token 0 the model gives (1/2, 1/4, 1/4), after token 2 it gives (1/10, 7/10, 2/10); the text is 0 2 1
    logits = torch.tensor([[[2.0, 1, 1], [1, 7, 2], [5, 5, 5]]]).log()
    torch.testing.assert_close(token_logps(logits, torch.tensor([[0, 2, 1]])), torch.tensor([[1 / 4, 7 / 10]]).log())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_of_any_precision_give_float32_logps_with_float32_accuracy(dtype):
    logits, ids = batch()
    logits = logits.to(dtype)
    mask = torch.tensor([[False, True, True, True, True, True]]).expand(3, 6)
    for logps, exact in (
        (token_logps(logits, ids), token_logps(logits.float(), ids)),
        (sequence_logps(logits, ids, mask), sequence_logps(logits.float(), ids, mask)),
    ):
        assert logps.dtype == torch.float32
        torch.testing.assert_close(logps, exact, rtol=0, atol=0)


def test_token_logps_and_gradients_are_finite_at_ten_thousand():
    logits, ids = torch.full((1, 3, 4), -1e4), torch.tensor([[0, 1, 2]])
    logits[0, :, 1] = 1e4  # token 1 is certain, token 2 all but impossible
    logps = token_logps(logits.requires_grad_(), ids)
    logps.sum().backward()
    assert logps.tolist() == [[0.0, -2e4]] and logits.grad.isfinite().all()


# sequence_logps


def test_sequence_logps_is_the_sum_over_response_tokens_and_not_their_mean():
    # every token has probability 1/4, so a response of n tokens has log-probability -n log 4
    logits, ids = torch.zeros(3, 6, 4), torch.zeros(3, 6, dtype=torch.int64)
    mask = torch.arange(6) >= torch.tensor([[5], [3], [1]])
    torch.testing.assert_close(sequence_logps(logits, ids, mask), -math.log(4) * torch.tensor([1.0, 3.0, 5.0]))


def test_the_eos_is_scored_where_the_mask_includes_it(padded):
    ids, _, response = padded
    logits = batch(b=2, t=7, v=11)[0]
    without_eos = response & ~torch.tensor([[0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    eos_logps = logits.log_softmax(-1)[[0, 1], [3, 5], EOS]
    difference = sequence_logps(logits, ids, response) - sequence_logps(logits, ids, without_eos)
    torch.testing.assert_close(difference, eos_logps)


@pytest.mark.parametrize("where", ["prompt", "padding"])
def test_minus_infinity_outside_the_response_gives_no_nan_in_value_or_gradient(where, padded):
    ids, _, response = padded
    logits = batch(b=2, t=7, v=11)[0]
    expected = sequence_logps(logits, ids, response)
    position = {"prompt": 0, "padding": 5}[where]
    logits[0, position, ids[0, position + 1]] = -math.inf
    logps = sequence_logps(logits.requires_grad_(), ids, response)
    assert torch.equal(logps, expected)
    logps.sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[0, position] == 0).all()


def test_each_row_of_a_padded_batch_equals_the_transformers_loss_of_that_row_alone(padded, gpt2):
    ids, real, response = padded
    with torch.no_grad():
        logps = sequence_logps(gpt2(ids, attention_mask=real).logits, ids, response)
        for row in range(2):
            length = int(real[row].sum())
            labels = ids[row].masked_fill(~response[row], -100)[None, :length]
            alone = gpt2(ids[row][None, :length], labels=labels).loss
            assert -logps[row].item() / int(response[row].sum()) == pytest.approx(alone.item(), rel=1e-5)


# Errors


@pytest.mark.parametrize(
    "logits, ids, words",
    [
        ((2, 5), (2, 5), r"\(B, T, V\).*got \(2, 5\)"),
        ((2, 4, 7), (2, 5), r"got \(2, 4, 7\) and \(2, 5\)\. Pass both unshifted"),
        ((2, 1, 7), (2, 1), "at least 2 tokens a row, got 1"),
    ],
)
def test_logits_and_ids_that_do_not_belong_together_raise(logits, ids, words):
    with pytest.raises(ValueError, match=f"token_logps: .*{words}"):
        token_logps(torch.zeros(logits), torch.zeros(ids, dtype=torch.int64))


@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.ones(4, 5, dtype=torch.int64), r"expected response_mask bool of shape \(4, 5\), got torch.int64"),
        (torch.ones(4, 4, dtype=torch.bool), r"bool of shape \(4, 5\), got torch.bool \(4, 4\)"),
        (torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]]).bool(), r"rows \[1, 3\] score their first token"),
        (torch.tensor([[0, 0, 1], [0, 0, 0], [0, 1, 1], [0, 0, 0]]).bool(), r"rows \[1, 3\] have no response token"),
    ],
)
def test_each_bad_response_mask_raises_and_names_the_rows(mask, words):
    ids = torch.zeros(4, 3 if "rows" in words else 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"sequence_logps: .*{words}"):
        sequence_logps(torch.zeros(*ids.shape, 7), ids, mask)


def test_one_row_without_a_batch_dimension_raises():
    with pytest.raises(ValueError, match=r"input_ids.*\(B, T\).*got \(5,\)"):
        sequence_logps(torch.zeros(5, 7), torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool))
