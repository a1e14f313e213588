"""Rows: what one loss term needs, made of preferences."""

from dataclasses import dataclass

import torch

from pdpo.data import Preference
from pdpo.encoding import Encoded, encode_records
from pdpo.losses import score_offset
from pdpo.presets import TrainConfig


@dataclass(frozen=True)
class Row:
    """What one loss term needs: one encoded response (SFT) or K of one prompt, best first."""

    sequences: tuple[Encoded, ...]  # K; for KTO the third is another prompt's, which its KL is measured on
    offset: float = 0.0  # the margin demanded: ODPO's (0 is DPO), or the difference of scores that e-DPO and DRDO regress on
    reference_logps: tuple[float, ...] | None = None  # K numbers in nats, once `with_reference_logps` has run

    num_tokens = property(lambda self: sum(len(each.input_ids) for each in self.sequences))


def preference_rows(tokenizer, records: list[Preference], config: TrainConfig) -> list[Row]:
    """Encoded rows of preferences; for ODPO with the offset that the scores demand (0 where a record has no scores), for e-DPO
    and DRDO with the difference of the scores, which every record must have."""
    offsets = [0.0] * len(records)
    scored = [i for i, record in enumerate(records) if record.scores is not None]
    regressed = config.method in ("edpo", "drdo")
    if regressed and len(scored) < len(records):
        got = f"{len(records)} records, got {len(scored)}"
        raise ValueError(f"preference_rows: {config.method} expected scores for all {got}. Score the others.")
    if (regressed or config.method == "odpo") and scored:
        scores = torch.tensor([records[i].scores for i in scored], dtype=torch.float64)  # (N, 2)
        is_control = config.offset_scale == "mean" and not regressed
        scale = "identity" if regressed else "log" if is_control else config.offset_scale
        values = score_offset(scores[:, 0], scores[:, 1], alpha=1.0 if regressed else config.alpha, scale=scale)
        values = values.mean().expand(len(scored)) if is_control else values
        for i, value in zip(scored, values.tolist(), strict=True):
            offsets[i] = value
    encoded = encode_records(tokenizer, records)
    if config.method == "kto":
        others = encoded[1:] + encoded[:1]
        encoded = [[*own, _answered(own[0], other[0], tokenizer)] for own, other in zip(encoded, others, strict=True)]
    return [Row(tuple(sequences), offset) for sequences, offset in zip(encoded, offsets, strict=True)]


def _answered(question: Encoded, answer: Encoded, tokenizer) -> Encoded:
    """The prompt of one sequence with the response of another."""
    ids = question.input_ids[: question.num_prompt] + answer.input_ids[answer.num_prompt :]
    return Encoded(ids[: tokenizer.model_max_length], question.num_prompt)
