"""Who decodes in the next step: as many as their ITL objectives allow (batch_limit.py)."""

from __future__ import annotations

from collections.abc import Iterable

from shared.core.batch_limit import Decoding, choose_batch, may_all_decode
from shared.core.chunking import ChunkParameters
from shared.core.decoding_rounds import DecodingRounds
from shared.core.sequences import Sequence
from shared.core.step_costs import StepCosts

MAX_ITL_SLO_S = 3_600.0


def measure_decoding(sequences: Iterable[Sequence]) -> DecodingRounds:
    """The last token of a prefill for another worker is not one of them."""
    rounds = [s for s in sequences if s.preemptible]
    if not rounds:
        return DecodingRounds(0, 0.0, MAX_ITL_SLO_S)
    mean_context = sum(s.kv.num_tokens for s in rounds) / len(rounds)
    tightest_s = min(s.itl_slo_s for s in rounds)
    return DecodingRounds(len(rounds), mean_context, min(MAX_ITL_SLO_S, max(0.0, tightest_s)))


def choose_decodes(
    ready: list[Sequence], parameters: ChunkParameters, costs: StepCosts | None, *, max_batch: int, now: float
) -> list[Sequence]:
    """Of those that are ready to decode. Prefills for other workers, at their last token, all are."""
    rounds = [s for s in ready if s.preemptible]
    if costs is None or not parameters.limits_batch or not rounds:
        return ready[:max_batch]
    decoding = [_as_decoding(sequence, now) for sequence in rounds]
    everybody = measure_decoding(rounds)
    if may_all_decode(costs, everybody.batch, everybody.mean_context, everybody.itl_slo_s):
        return ready[:max_batch]
    chosen = [rounds[index] for index in choose_batch(costs, decoding, everybody.mean_context, now)]
    return [*(s for s in ready if not s.preemptible), *chosen][:max_batch]


def _as_decoding(sequence: Sequence, now: float) -> Decoding:
    """Its first token is there since it was first ready to decode."""
    if sequence.first_token_at is None:
        sequence.first_token_at = now
    num_produced = sequence.kv.num_tokens - sequence.output_start
    return Decoding(sequence.first_token_at, num_produced, sequence.itl_slo_s)
