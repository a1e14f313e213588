"""Log-probabilities of responses against transformers' own loss, whatever the precision and whatever stands outside of them."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pdpo.logps import sequence_logps, token_logps

EOS = 0  # GPT-2 has no pad token: it pads with its EOS
# two prompts with responses that end in EOS, padded on the right with EOS
IDS = torch.tensor([[3, 4, 5, 6, EOS, EOS, EOS], [7, 2, 9, 8, 1, 10, EOS]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
RESPONSE = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)


def some_logits() -> torch.Tensor:
    return 3 * torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))


def test_each_row_of_a_padded_batch_equals_the_transformers_loss_of_that_row_alone():
    config = dict(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2 = GPT2LMHeadModel(GPT2Config(**config, initializer_range=0.5)).eval()
    with torch.no_grad():
        logps = sequence_logps(gpt2(IDS, attention_mask=REAL).logits, IDS, RESPONSE)
        for row in range(2):
            length = int(REAL[row].sum())
            labels = IDS[row].masked_fill(~RESPONSE[row], -100)[None, :length]
            alone = gpt2(IDS[row][None, :length], labels=labels).loss
            assert -logps[row].item() / int(RESPONSE[row].sum()) == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_of_any_precision_give_float32_logps_with_float32_accuracy(dtype):
    logits = some_logits().to(dtype)
    logps = sequence_logps(logits, IDS, RESPONSE)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, sequence_logps(logits.float(), IDS, RESPONSE), rtol=0, atol=0)


@pytest.mark.parametrize("position", [0, 5], ids=["prompt", "padding"])
def test_minus_infinity_outside_the_response_gives_no_nan_in_value_or_gradient(position):
    logits = some_logits()
    expected = sequence_logps(logits, IDS, RESPONSE)
    logits[0, position, IDS[0, position + 1]] = -math.inf
    logps = sequence_logps(logits.requires_grad_(), IDS, RESPONSE)
    assert torch.equal(logps, expected)
    logps.sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[0, position] == 0).all()


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
        ([[0, 0, 1]] * 4, r"expected response_mask bool of shape \(4, 3\), got torch.int64"),
        (torch.ones(4, 4).bool(), r"bool of shape \(4, 3\), got torch.bool \(4, 4\)"),
        (torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]]).bool(), r"rows \[1, 3\] score their first token"),
        (torch.tensor([[0, 0, 1], [0, 0, 0], [0, 1, 1], [0, 0, 0]]).bool(), r"rows \[1, 3\] have no response token"),
    ],
)
def test_each_bad_response_mask_raises_and_names_the_rows(mask, words):
    with pytest.raises(ValueError, match=f"sequence_logps: .*{words}"):
        sequence_logps(torch.zeros(4, 3, 7), torch.zeros(4, 3, dtype=torch.int64), torch.as_tensor(mask))


def test_one_row_without_a_batch_dimension_raises():
    with pytest.raises(ValueError, match=r"input_ids.*\(B, T\).*got \(5,\)"):
        sequence_logps(torch.zeros(5, 7), torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool))
