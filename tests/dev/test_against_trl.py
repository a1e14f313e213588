"""sequence_logps and the losses of DPO, IPO, SimPO, ORPO and KTO against TRL's, on two small random GPT-2s. Written for trl 1.16.0.

TRL is no dependency of pdpo: in another environment, `pip install torch==2.13.0 trl==1.16.0 pytest`, then
`PYTHONPATH=. python -m pytest tests/dev/test_against_trl.py -s`.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed; the first lines of this file say how to run it")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from pdpo.logps import sequence_logps
from pdpo.losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss

WORDS = ["<eos>", *"the capital of France is Paris Rome opposite hot cold tea very a big".split()]
PAIRS = [
    {"prompt": "the capital of France is", "chosen": " Paris", "rejected": " Rome a big Rome"},
    {"prompt": "the opposite of hot is", "chosen": " very cold tea", "rejected": " tea"},
    {"prompt": "a big", "chosen": " hot tea", "rejected": " France is hot"},
]


def random_gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def trl_trainer(tmp_path, trainer=DPOTrainer, config_class=DPOConfig, rows=PAIRS, seeds=(0, 1), **config):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    arguments = config_class(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1, max_steps=1,
        per_device_train_batch_size=len(rows), learning_rate=1e-3, max_grad_norm=1e9, gradient_checkpointing=False, **config,
    )  # fmt: skip
    return trainer(
        random_gpt2(seeds[0]),
        ref_model=random_gpt2(seeds[1]),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def ours(policy, reference, pairs, *, loss=dpo_loss, means=False, **arguments):
    """The same batch without TRL: words to ids, EOS appended, EOS as padding, both responses through both models."""
    rows = [(p["prompt"].split(), p[side].split() + ["<eos>"]) for side in ("chosen", "rejected") for p in pairs]
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        ids[i, : lengths[i]] = torch.tensor([WORDS.index(word) for word in prompt + response])
        mask[i, len(prompt) : lengths[i]] = True
    real = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    policy_logps = sequence_logps(policy(ids, attention_mask=real).logits, ids, mask)
    with torch.no_grad():
        reference_logps = sequence_logps(reference(ids, attention_mask=real).logits, ids, mask)
    if means:
        policy_logps, reference_logps = policy_logps / mask.sum(1), reference_logps / mask.sum(1)
    return policy_logps, loss(*policy_logps.chunk(2), *reference_logps.chunk(2), **arguments)


@pytest.mark.parametrize(
    "row, loss_type, label_smoothing",
    [(0, "sigmoid", 0.0), (1, "ipo", 0.0), (2, "aot", 0.1), (0, "aot", 0.4), (1, "robust", 0.2)],
)
def test_each_pair_has_trls_loss_and_gradient(tmp_path, row, loss_type, label_smoothing):
    # TRL 1.16 has label smoothing as such in "aot" only, which on one pair has nothing to sort: our dpo_loss. "robust" is
    # ((1 - e) L(pair) - e L(flipped pair)) / (1 - 2 e), and L(flipped) = L(pair) + margin. "ipo" is on means over tokens.
    trainer = trl_trainer(tmp_path, beta=0.3, loss_type=loss_type, label_smoothing=label_smoothing)
    inputs = trainer.data_collator([trainer.train_dataset[row]])
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    policy = random_gpt2(0)
    if loss_type == "ipo":
        loss = ours(policy, random_gpt2(1), PAIRS[row : row + 1], loss=ipo_loss, means=True, beta=0.3)[1].losses
    elif loss_type == "robust":
        _, result = ours(policy, random_gpt2(1), PAIRS[row : row + 1], beta=0.3)
        flipped = [{**PAIRS[row], "chosen": PAIRS[row]["rejected"], "rejected": PAIRS[row]["chosen"]}]
        _, mirror = ours(policy, random_gpt2(1), flipped, beta=0.3)
        loss = ((1 - label_smoothing) * result.losses - label_smoothing * mirror.losses) / (1 - 2 * label_smoothing)
    else:
        loss = ours(policy, random_gpt2(1), PAIRS[row : row + 1], beta=0.3, label_smoothing=label_smoothing)[1].losses
    loss.sum().backward()
    torch.testing.assert_close(loss.sum(), theirs, rtol=1e-5, atol=1e-6)
    for mine, his in zip(policy.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, his.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale, offset", [(2.0, 1.0), (10.0, 3.0)])
def test_simpo_and_orpo_have_trls_losses_and_gradients(scale, offset):
    means = -torch.rand(2, 7, generator=torch.Generator().manual_seed(0)) * 3
    mine, theirs = means.clone().requires_grad_(), means.clone().requires_grad_()
    here = SimpleNamespace(device=torch.device("cpu"))
    simpo = SimpleNamespace(alpha=0.0, loss_type="simpo", simpo_gamma=offset, beta=scale, label_smoothing=0.0, accelerator=here)
    orpo = SimpleNamespace(beta=0.3, accelerator=here)
    pairs = [
        (simpo_loss(*mine, scale=scale, offset=offset).losses, CPOTrainer.cpo_loss(simpo, *theirs)[0]),
        # TRL's losses are what is taken off the chosen response's likelihood loss
        (orpo_loss(*mine, weight=0.3).losses, -theirs[0] - ORPOTrainer.odds_ratio_loss(orpo, *theirs)[0]),
    ]
    for one, other in pairs:
        torch.testing.assert_close(one, other)
        slopes = torch.autograd.grad(one.sum(), mine)[0], torch.autograd.grad(other.sum(), theirs)[0]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_kto_has_trls_loss_and_gradient_with_its_mismatched_responses(tmp_path):
    rows = [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for p in PAIRS
        for side in ("chosen", "rejected")
    ]
    trainer = trl_trainer(tmp_path, KTOTrainer, KTOConfig, rows, seeds=(1, 0), beta=0.3, train_sampling_strategy="sequential")
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    theirs.backward()
    policy, reference = random_gpt2(1), random_gpt2(0)  # with the seeds the other way round z is clamped to 0
    # TRL's mismatched response is that of the row before
    mixed = [{"prompt": row["prompt"], "chosen": rows[i - 1]["completion"], "rejected": " tea"} for i, row in enumerate(rows)]

    def kto(*logps, beta):
        return kto_loss(*logps, kl, beta=beta)

    with torch.no_grad():
        mismatched, result = ours(policy, reference, mixed, beta=1.0)
        kl = result.chosen_rewards.mean().clamp(min=0)
    _, result = ours(policy, reference, PAIRS, loss=kto, beta=0.3)
    loss = result.losses.mean() / 2  # over responses, not pairs
    loss.backward()
    assert kl > 0
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    for mine, his in zip(policy.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, his.grad, rtol=1e-4, atol=1e-5)
