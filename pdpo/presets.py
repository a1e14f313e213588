"""What an experiment runs with: one frozen dataclass, one instance a machine size."""

import os
from dataclasses import dataclass, replace

import torch

DEFAULT_JUDGE = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Preset:
    """Everything that a stage needs to know besides its method, beta and seed. Steps are optimizer steps."""

    name: str
    data: str = "toy"  # a name or file that load_preferences takes
    model: str | None = None  # a folder or hub name; None: random GPT-2 weights of the sizes below
    tokenizer: str | None = None  # a folder or hub name; None: the model's own, or a BPE trained on the training split
    vocab_size: int = 800  # of that BPE
    embedding: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64  # longest sequence in tokens
    precision: str = "float32"  # "bfloat16", "float16": of the activations; weights stay float32. "auto": get_preset chooses

    sft_steps: int = 600
    sft_batch_size: int = 64  # sequences
    sft_lr: float = 6e-3
    sft_all_responses: bool = True  # False: demonstrations are the best response alone

    preference_steps: int = 100
    preference_batch_size: int = 32  # pairs
    preference_lr: float = 2e-4
    pairs_per_prompt: int | None = 2  # None: all pairs
    alpha: float = 0.5  # ODPO's strength
    offset_scale: str = "log"

    micro_batch_size: int = 64  # sequences in memory at a time
    num_evaluations: int = 10  # held-out measurements along a run
    num_kl_prompts: int = 64  # prompts sampled for the KL at each of them
    checkpoint_seconds: float = 30.0

    betas: tuple[float, ...] = (0.05, 0.1, 0.3, 0.7, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_samples: int = 2  # responses a prompt when evaluated
    max_new_tokens: int = 28
    judge: str = DEFAULT_JUDGE

    def claim(self, text: str, otherwise: str = "no claim: what is checked here was found on the toy") -> str:
        """The text where this preset's data is the toy, on which the notebooks' claims are checked; otherwise the other."""
        return text if self.data == "toy" else otherwise


PRESETS = {
    # a laptop CPU without a model hub; what CI runs
    "tiny": Preset("tiny", num_evaluations=5),
    # random weights with room for real text: checks a real file end to end on a CPU
    "small": Preset(
        "small", data="instructions", vocab_size=4000, embedding=128, layers=2, heads=4, context=512,
        sft_steps=200, sft_batch_size=16, sft_lr=2e-3, sft_all_responses=False,
        preference_steps=60, preference_batch_size=8, preference_lr=2e-4, pairs_per_prompt=None,
        micro_batch_size=16, num_evaluations=4, num_kl_prompts=16, num_samples=1, max_new_tokens=64, seeds=(0,),
        betas=(0.1, 0.3, 0.7, 1.0),
    ),
    # the report's experiment on one GPU, a free Colab T4 included; every run is 1.4 GB, the sweep of both methods 13 GB
    "gpt2-medium": Preset(
        "gpt2-medium", data="instructions", model="openai-community/gpt2-medium", context=1024, precision="auto",
        sft_steps=180, sft_batch_size=16, sft_lr=5e-5, sft_all_responses=False,  # 3 epochs
        preference_steps=230, preference_batch_size=8, preference_lr=5e-6, pairs_per_prompt=None,  # 2 epochs
        micro_batch_size=16, num_kl_prompts=32, num_samples=1, max_new_tokens=96, seeds=(0,), betas=(0.1, 0.3, 0.7, 1.0),
    ),
}  # fmt: skip


def get_preset(name: str | Preset | None = None) -> Preset:
    """The preset of that name, by default $PDPO_PRESET, else `gpt2-medium` where CUDA is present, else `tiny`.

    A Preset is given back as it is.

    Raises:
        ValueError: no such preset.
    """
    if isinstance(name, Preset):
        return name
    name = name or os.environ.get("PDPO_PRESET") or ("gpt2-medium" if torch.cuda.is_available() else "tiny")
    if name not in PRESETS:
        raise ValueError(f"get_preset: expected one of {', '.join(PRESETS)}, got {name!r}. Set PDPO_PRESET to one of them.")
    preset = PRESETS[name]
    return replace(preset, precision=choose_precision()) if preset.precision == "auto" else preset


def choose_precision(capability: tuple[int, int] | None = None) -> str:
    """bfloat16 on Ampere and later, float16 (with a loss scaler) on older GPUs such as the T4, float32 on the CPU.

    Args:
        capability: CUDA's (major, minor), (7, 5) for a T4; None asks this machine.
    """
    if capability is None:
        if not torch.cuda.is_available():
            return "float32"
        capability = torch.cuda.get_device_capability()
    return "bfloat16" if capability >= (8, 0) else "float16"


def device() -> torch.device:
    """cuda where present, else cpu; of the processes that torchrun starts on one machine, each has its own GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")
