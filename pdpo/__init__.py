"""pdpo: notebooks that derive, train and measure preference optimisation. What they use is named here."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

from pdpo import reach  # noqa: F401  (reads the sources before any of them runs: what a stage is known by)

warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's, when transformers imports it without ipywidgets: a red box

if TYPE_CHECKING:
    from pdpo.data import Preference, data_report, load_preferences, load_split, pairs, split
    from pdpo.logps import sequence_logps, token_logps
    from pdpo.losses import PairLoss, dpo_loss, plackett_luce_loss, score_offset, sft_loss
    from pdpo.preferences import bradley_terry_logps, gumbel_ranking, gumbel_sample, plackett_luce_logps

__version__ = "0.1.0"
__all__ = [
    "PairLoss", "Preference", "bradley_terry_logps", "data_report", "dpo_loss", "gumbel_ranking", "gumbel_sample",
    "load_preferences", "load_split", "pairs", "plackett_luce_logps", "plackett_luce_loss", "score_offset", "sequence_logps",
    "sft_loss", "split", "token_logps",
]  # fmt: skip


def __getattr__(name: str):
    """The names above, from their modules when first asked for: torch takes seconds to import, and `--help` needs none."""
    for module in ("data", "logps", "losses", "preferences") if name in __all__ else ():
        if hasattr(found := import_module(f"pdpo.{module}"), name):
            return getattr(found, name)
    raise AttributeError(f"module 'pdpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
