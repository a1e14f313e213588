"""Nothing is silently wrong: what is damaged, stale, out of place or out of range is noticed, said in one line, and lost nowhere."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import nbformat
import psutil
import pytest
import stages
import torch
import transformers
from conftest import refusal, same_weights, wait_until
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import pdpo
from pdpo import __main__, experiments, files, kept, making, models
from pdpo.checkpoint import load_checkpoint, save_checkpoint
from pdpo.files import is_whole, read_sealed, source_digest, write_sealed
from pdpo.stages import check_large_files


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}
STAGES = {  # what a call gives, as something that can be compared
    "sft": lambda sft: (sft.path, sft.history),
    "preference": lambda sft: (lambda run: (run.path, run.history))(experiments.run_preference(sft, method="dpo", beta=0.1)),
    "reward model": lambda sft: (lambda made: (made.path, made.held_out.tolist()))(experiments.run_reward_model(sft)),
    "win rate": lambda sft: (lambda made: (made.path, made.rows))(stages.run_win_rate(run=sft)),
}


@pytest.mark.parametrize("kind, file, damage", [
    ("sft", "policy/model.safetensors", "flipped"), ("sft", "stage.json", "flipped"), ("sft", "policy/tokenizer.json", "deleted"),
    ("preference", "policy/config.json", "a folder"), ("preference", "stage.json", "emptied"),
    ("reward model", "reward_model.json", "flipped"), ("win rate", "rows.json", "cut"),
])  # fmt: skip
def test_a_damaged_stage_is_set_aside_said_and_made_again(quick, capsys, kind, file, damage):
    sft = experiments.run_sft(quick)
    path, before = STAGES[kind](sft)
    DAMAGES[damage](path / file)
    capsys.readouterr()
    again, after = STAGES[kind](experiments.run_sft(quick))
    assert again == path and after == before and (path / file).is_file()
    said = capsys.readouterr().out
    assert str(path) in said and f"set aside as {path.name}.damaged1" in said and "and made again" in said
    assert path.with_name(f"{path.name}.damaged1").is_dir()


def test_large_weights_are_checked_when_they_are_first_needed(quick, monkeypatch):
    monkeypatch.setattr(pdpo.stages, "LARGE", 1000)
    run = experiments.run_sft(quick)
    flip(run.path / "policy" / "model.safetensors")
    assert experiments.run_sft(quick).path == run.path  # nothing needed them so far
    with pytest.raises(ValueError, match="was damaged and has been set aside. Run the same again"):
        run.load_policy()
    check_large_files.cache_clear()
    assert same_weights(experiments.run_sft(quick), experiments.run_sft(replace(quick, name="other")))


def test_damaged_reference_log_probabilities_are_computed_anew(quick, capsys):
    sft = experiments.run_sft(quick)
    before = experiments.run_preference(sft, method="dpo", beta=0.1).history
    (first, *_) = sorted(sft.path.parent.glob("*-reference-*.json"))
    flip(first)
    shutil.rmtree(experiments.run_preference(sft, method="dpo", beta=0.1).path)
    assert experiments.run_preference(sft, method="dpo", beta=0.1).history == before
    assert f"{first.name}.damaged1" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_set_aside_and_training_begins_anew(tmp_path, capsys):
    path, state = tmp_path / "checkpoint.pt", {"policy": {"weight": torch.arange(1000.0)}, "config": {"lr": 1.0}}
    save_checkpoint(path, state)
    assert torch.equal(load_checkpoint(path, {"lr": 1.0})["policy"]["weight"], state["policy"]["weight"])
    flip(path)
    assert load_checkpoint(path, {"lr": 1.0}) is None and "set aside" in capsys.readouterr().out
    assert not path.exists() and (tmp_path / "checkpoint.pt.damaged1").exists()


def test_a_seal_sees_every_single_byte(tmp_path):
    file = tmp_path / "file"
    write_sealed(file, b"twelve bytes")
    whole = file.read_bytes()
    assert read_sealed(file) == b"twelve bytes" and read_sealed(tmp_path / "absent") is None
    for i in range(len(whole)):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        assert not is_whole(file)
    for content in (whole[:-1], whole + b" ", b"", whole[:5]):
        file.write_bytes(content)
        assert not is_whole(file)


def test_files_and_stages_reach_the_disk_before_they_take_their_name(quick, tmp_path, monkeypatch):
    seen, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(os.fstat(number).st_ino) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: seen.append(str(paths[1])) or rename(*paths))
    files.write_json(tmp_path / "a.json", 1)
    assert seen == [(tmp_path / "a.json").stat().st_ino, str(tmp_path / "a.json")]
    path = experiments.run_sft(quick).path
    assert seen.index((path / "policy" / "model.safetensors").stat().st_ino) < seen.index(str(path))


class Encoder:
    """Counts what it is asked, and answers with each text's length and bytes."""

    def __init__(self):
        self.asked = []

    def encode(self, texts, **_):
        self.asked += texts
        return [[len(text), sum(text.encode())] for text in texts]


def test_the_judges_store_confuses_no_two_texts_and_survives_damage(tmp_path, capsys):
    file, texts = tmp_path / "store", ["abc", "abc\0", "abc\n", " abc", "é", "é", ""]
    first = models.Judge(Encoder(), file).embed(texts)
    again = models.Judge(Encoder(), file)
    assert torch.equal(again.embed(texts), first) and again.model.asked == []
    flip(file)
    anew = models.Judge(Encoder(), file)
    assert torch.equal(anew.embed(texts), first) and set(anew.model.asked) == set(texts)
    assert "set aside as store.damaged1" in capsys.readouterr().out


# weights and staleness


def test_a_model_whose_tensors_are_not_its_own_is_refused_with_their_names(tmp_path, tiny_tokenizer):
    preset = replace(pdpo.presets.get_preset("tiny"), embedding=32, heads=2)
    models.load_policy(preset, tokenizer=tiny_tokenizer).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    preset = replace(preset, model=str(tmp_path))
    whole = load_file(tmp_path / "model.safetensors")
    some = next(key for key in whole if "h.1.mlp.c_fc.weight" in key)
    for named, tensors in [
        ("h.1.mlp.c_fc.weight", {key: value for key, value in whole.items() if key != some}),
        ("h.9.bias", whole | {"h.9.bias": torch.zeros(3)}),
        ("h.1.mlp.c_fc.weight", whole | {some: torch.zeros(3, 5)}),
    ]:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError) as caught:
            models.load_policy(preset)
        assert named in str(caught.value) and "connect" not in str(caught.value)
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    models.load_policy(preset)
    with pytest.raises(ValueError, match="at least 65 positions, the preset's context, got 64"):
        models.load_policy(replace(preset, context=65))
    num = len(tiny_tokenizer)
    larger = type("Tokenizer", (), {"__len__": lambda self: num + 1})()
    with pytest.raises(ValueError, match=rf"each of the tokenizer's {num + 1} tokens, got {num}"):
        models.load_policy(preset, tokenizer=larger)


def test_a_folder_replaced_by_one_of_equal_size_and_time_is_another_one(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    stat, before = (tmp_path / "config.json").stat(), source_digest(str(tmp_path))
    (tmp_path / "config.json").write_text('{"a": 2}')
    os.utime(tmp_path / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    source_digest.cache_clear()  # as in a new process
    assert source_digest(str(tmp_path)) != before


def test_a_stage_of_another_version_is_not_taken_and_runs_says_why_and_prunes_what_is_asked_for(quick, monkeypatch, capsys):
    old = experiments.run_sft(quick)
    child = experiments.run_preference(old, method="dpo", beta=0.1)
    assert [each["why_not"] for each in kept.kept_stages()] == ["", ""]
    now = pdpo.stages.library_versions() | {"torch": "99.0"}
    for module in (pdpo.stages, kept):
        monkeypatch.setattr(module, "library_versions", lambda: now)
    new = experiments.run_sft(quick)
    assert new.path != old.path
    flip(child.path / "history.json")
    shutil.copytree(new.path, new.path.with_name("sft.partial"))
    why = {Path(each["stage"]).name: each["why_not"] for each in kept.kept_stages()}
    assert why[new.path.name] == "" and f"torch {torch.__version__}, now 99.0" in why[old.path.name]
    assert "history.json is not what was written" in why[child.path.name] and "unfinished" in why["sft.partial"]
    kept.print_kept(True, answer=lambda question: "n")
    assert old.path.is_dir()
    kept.print_kept(True, answer=lambda question: "y")
    assert not old.path.exists() and new.path.is_dir() and new.path.with_name("sft.partial").is_dir()
    assert "2 removed" in capsys.readouterr().out


# refused early, in one line


def write_rows(path: Path, number: int = 40, **changes) -> str:
    row = {"prompt": "What is {}?", "chosen": "It is {}.", "rejected": "Nothing."} | changes
    rows = [{key: value.format(i) if isinstance(value, str) else value for key, value in row.items()} for i in range(number)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


TRAIN = ["train", "--preset", "small"]
REFUSED = [  # what a configuration refuses in test_training.py, some of it here
    (["--beta", "1e400"], "beta"), (["--steps", str(2**70)], "to 2**31 - 1"), (["--out", "{file}/under/a/file"], "no folder"),
    (["--out", "{tmp}/dangling"], "expected an empty or a new folder"), (["--data", "{tmp}/pipe.json"], "a pipe or a device"),
    (["--data", "{few}"], "at least 2 prompts to test on"), (["--data", "{equal}"], "different responses"),
    (["--data", "{long}"], "at most 1000000 characters"), (["--model", "{tmp}/empty"], "model's or tokenizer's files"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, words", REFUSED, ids=[" ".join(each[0])[:40] for each in REFUSED])
def test_bad_input_is_refused_in_one_line_before_anything_is_trained(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(making, "train", None)
    places = {"tmp": tmp_path, "file": write_rows(tmp_path / "rows.jsonl")}
    places["few"] = write_rows(tmp_path / "few.jsonl", 15)
    places["equal"] = write_rows(tmp_path / "equal.jsonl", chosen="Nothing.")
    places["long"] = write_rows(tmp_path / "long.jsonl", chosen="x" * 1_000_001, number=1)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert words in refusal(capsys, *TRAIN, "--data", places["file"], *(each.format(**places) for each in arguments))
    assert not list((tmp_path / "runs").rglob("sft-*")) or "--model" in arguments


def test_a_runs_folder_that_is_a_file_a_disk_without_room_and_a_senseless_number_of_workers_are_refused(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(making, "train", None)
    data = write_rows(tmp_path / "rows.jsonl")
    monkeypatch.setenv("PDPO_RUNS_DIR", data)
    assert "no folder" in refusal(capsys, *TRAIN, "--data", data)
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("PDPO_WORKERS", "0")
    assert "PDPO_WORKERS: expected a number of processes" in refusal(capsys, *TRAIN, "--data", data)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert "GB free for what will be written, got 0.0 GB" in refusal(capsys, *TRAIN, "--data", data)


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, "No space left on device", "x"), "the disk is full"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 12160 vs 12054"), "the disk is full"),
    (OSError(errno.EROFS, "Read-only file system", "x"), "Expected a place to write to"),
    (shutil.Error([("a", "b", "Permission denied")]), "Expected a place to write to"),
    (ZeroDivisionError("ours"), ""),
])  # fmt: skip
def test_what_the_disk_refuses_is_one_line_and_what_the_program_does_wrong_a_traceback(
    tmp_path, capsys, monkeypatch, error, words
):
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(experiments, "run_sft", mock.Mock(side_effect=error))
    data = write_rows(tmp_path / "rows.jsonl")
    if words:
        assert words in refusal(capsys, *TRAIN, "--data", data)
    with pytest.raises(type(error)):
        __main__.main([*TRAIN, "--data", data, *(["--debug"] if words else [])])


def test_scores_beyond_measure_are_refused():
    with pytest.raises(ValueError, match=r"rows \[0\] have scores that are not finite, or too large"):
        pdpo.score_offset(torch.tensor([1e308], dtype=torch.float64), torch.tensor([-1e308], dtype=torch.float64))


# it stops


def test_a_command_that_is_stopped_says_what_goes_on(forked):
    process = forked(stages.command_without_end)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and "the same command goes on" in error and "Traceback" not in error


@pytest.mark.slow
def test_a_stopped_run_leaves_no_kernel_at_work(tmp_path, python):
    (tmp_path / "notebooks").mkdir()
    shutil.copytree(Path(pdpo.__file__).parent, tmp_path / "pdpo", ignore=shutil.ignore_patterns("__pycache__"))
    cell = nbformat.v4.new_code_cell(f"import time\nopen({str(tmp_path / 'begun')!r}, 'w')\ntime.sleep(600)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks" / "01_a.ipynb")
    process = python("-P", "-m", "pdpo", "run", PYTHONPATH=str(tmp_path), PDPO_RUNS_DIR=str(tmp_path / "runs"))
    wait_until(lambda: (tmp_path / "begun").exists() or process.poll() is not None)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command goes on" in error and "Traceback" not in error
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


# any causal model

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 96}
FAMILIES = {  # with the ends that its models are published with
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96, "eos_token_id": None},
    "Llama": SIZES | {"hidden_size": 32, "intermediate_size": 64, "eos_token_id": [0, 1, 2]},  # a list, as Llama 3.1's
    "Gemma": SIZES | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 1},
    "OPT": SIZES | {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "GPTNeoX": SIZES | {"hidden_size": 32, "intermediate_size": 64},  # Pythia
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_another_family_is_trained_and_loads_again_and_its_bos_is_kept(tmp_path, monkeypatch, capsys, family):
    monkeypatch.setenv("PDPO_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(experiments, "load_judge", lambda *_, **__: stages.Judge())
    data = write_rows(tmp_path / "rows.jsonl", 30)
    tokenizer = models.train_tokenizer(pdpo.load_preferences(data), vocab_size=300)
    adds_bos = family in ("Llama", "Gemma", "OPT")
    if adds_bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        ends = {"single": "<s> $A", "special_tokens": [("<s>", tokenizer.bos_token_id)]}
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**ends)
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **FAMILIES[family])
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preset = replace(pdpo.presets.PRESETS["small"], context=96, max_new_tokens=8, num_kl_prompts=3)
    monkeypatch.setitem(pdpo.presets.PRESETS, "small", preset)
    quick = ["--preset", "small", "--sft-steps", "2", "--steps", "2", "--model", str(folder), "--data", data]
    assert __main__.main(["train", *quick, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    policy, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = pdpo.encoding.encode(loaded, "What is 3?", "It is 3.", max_length=96).input_ids
    assert (ids[0] == loaded.bos_token_id) == adds_bos and policy(input_ids=torch.tensor([ids])).logits.isfinite().all()
    (cut,) = pdpo.encoding.encode_records(loaded, [pdpo.Preference("word " * 60, ("a", "b " * 20))], max_length=60)
    prompts = [ids[:num_prompt] for ids, num_prompt in cut]
    assert prompts[0] == prompts[1] and max(len(ids) for ids, _ in cut) == 60  # both responses are given one prompt
    assert (prompts[0][0] == loaded.bos_token_id) == adds_bos
