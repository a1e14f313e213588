"""pdpo: notebooks that derive, train and measure preference optimisation. What they use is named here."""

from pdpo.data import Preference, data_report, load_preferences, load_split, pairs, split
from pdpo.logps import sequence_logps, token_logps
from pdpo.losses import PairLoss, dpo_loss, plackett_luce_loss, score_offset, sft_loss
from pdpo.preferences import bradley_terry_logps, gumbel_ranking, gumbel_sample, plackett_luce_logps

__version__ = "0.1.0"
__all__ = [
    "PairLoss",
    "Preference",
    "bradley_terry_logps",
    "data_report",
    "dpo_loss",
    "gumbel_ranking",
    "gumbel_sample",
    "load_preferences",
    "load_split",
    "pairs",
    "plackett_luce_logps",
    "plackett_luce_loss",
    "score_offset",
    "sequence_logps",
    "sft_loss",
    "split",
    "token_logps",
]
