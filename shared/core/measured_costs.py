"""Step costs of a worker: from a profile, or, without one, from the few rates that its heartbeats measure.

The rule behind measured costs: T_pre = overhead + l_incr / rate * (1 + mean context / 20k); T_dec is the step measured
last, and grows with the batch by the rate; T_kv = overhead + bytes / rate. Priors stand in until something is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from shared.core.profile import Curve, DegreeProfile, Grid, Links, Profile
from shared.core.step_costs import PREFILL_STEP_TOKENS, StepCosts
from shared.messages import Heartbeat

PRIOR_PREFILL_TOKENS_PER_S = 2_000.0
PRIOR_KV_BYTES_PER_S = 500e6
PRIOR_HOST_BYTES_PER_S = 4e9
PRIOR_DECODE_STEP_S = 0.05
PREFILL_OVERHEAD_S = 0.002
TRANSFER_OVERHEAD_S = 0.002
# A new token attends to every token before it: at this many tokens of context, attention costs as much as the rest.
ATTENTION_EQUAL_TOKENS = 20_000
REBUILT_BEYOND = 0.2  # relative: rates that moved less keep their costs

_CHUNKS = (0, 64, 256, 512, 1_024, 2_048, 4_096, PREFILL_STEP_TOKENS)


@dataclass(frozen=True, slots=True)
class MeasuredRates:
    """What measured costs are made of. `decode_step_s` was measured with `decode_batch` sequences."""

    prefill_tokens_per_s: float
    decode_step_s: float
    kv_bytes_per_s: float
    kv_bytes_per_token: int
    decode_batch: int = 1

    @classmethod
    def of(cls, heartbeat: Heartbeat) -> MeasuredRates:
        """As a worker reports them; 0 there means that nothing was measured yet."""
        return cls(
            prefill_tokens_per_s=heartbeat.prefill_tokens_per_s or PRIOR_PREFILL_TOKENS_PER_S,
            decode_step_s=heartbeat.decode_step_s or PRIOR_DECODE_STEP_S,
            kv_bytes_per_s=heartbeat.kv_bytes_per_s or PRIOR_KV_BYTES_PER_S,
            kv_bytes_per_token=heartbeat.kv_bytes_per_token,
            decode_batch=max(1, heartbeat.num_running),
        )

    def have_moved_from(self, built: MeasuredRates) -> bool:
        """Whether costs built from `built` are too far off. The batch alone moves nothing."""
        pairs = (
            (self.prefill_tokens_per_s, built.prefill_tokens_per_s),
            (self.decode_step_s, built.decode_step_s),
            (self.kv_bytes_per_s, built.kv_bytes_per_s),
        )
        return self.kv_bytes_per_token != built.kv_bytes_per_token or any(
            abs(new - old) > REBUILT_BEYOND * old for new, old in pairs
        )


def build_measured_costs(rates: MeasuredRates, *, parallel_degree: int, num_kv_tokens: int) -> StepCosts:
    """The rates as a small profile of one worker, whatever its devices: its rates are of all of them together."""
    token_s = 1.0 / rates.prefill_tokens_per_s
    attended_s = token_s / ATTENTION_EQUAL_TOKENS  # one new token, one token before it
    step_s = max(0.0, rates.decode_step_s - PREFILL_OVERHEAD_S - rates.decode_batch * token_s)
    profile = DegreeProfile(
        parallel_degree=1,
        num_kv_tokens=max(1, num_kv_tokens),
        linear=Curve(at=(0, 1), s=(PREFILL_OVERHEAD_S, PREFILL_OVERHEAD_S + token_s)),
        prefill_attention=Grid(
            rows=(0, ATTENTION_EQUAL_TOKENS),
            columns=_CHUNKS,
            s=tuple(
                tuple(chunk * (history + chunk / 2) * attended_s for chunk in _CHUNKS)
                for history in (0, ATTENTION_EQUAL_TOKENS)
            ),
        ),
        decode_attention=Grid(rows=(0, 1), columns=(0, 1), s=((step_s, step_s), (step_s, step_s))),
    )
    links = Links(
        devices_per_node=1,
        intra_node_bytes_per_s=rates.kv_bytes_per_s,
        inter_node_bytes_per_s=rates.kv_bytes_per_s,
        host_bytes_per_s=PRIOR_HOST_BYTES_PER_S,
        latency_s=TRANSFER_OVERHEAD_S,
    )
    costs = StepCosts(profile, links, rates.kv_bytes_per_token)
    costs.parallel_degree = parallel_degree
    return costs


def build_profile_costs(profile: Profile, parallel_degree: int, scale: float) -> StepCosts | None:
    """A profile's costs on a worker that runs `scale` times slower, its links too; None: no such parallel degree."""
    for degree in profile.degrees:
        if degree.parallel_degree == parallel_degree:
            return StepCosts(degree, _slow_down(profile.links, scale), profile.kv_bytes_per_token, scale=scale)
    return None


def _slow_down(links: Links, scale: float) -> Links:
    return msgspec.structs.replace(
        links,
        intra_node_bytes_per_s=links.intra_node_bytes_per_s / scale,
        inter_node_bytes_per_s=links.inter_node_bytes_per_s / scale,
        host_bytes_per_s=links.host_bytes_per_s / scale,
        latency_s=links.latency_s * scale,
    )


@dataclass(slots=True, eq=False)
class WorkerCosts:
    """The costs of one worker as they stand. `rates` is None where a profile speaks for it."""

    costs: StepCosts
    rates: MeasuredRates | None

    @classmethod
    def of(cls, heartbeat: Heartbeat, profile: Profile | None, scale: float) -> WorkerCosts:
        """By the profile if it is the one the worker runs or was measured with (a worker that names none is taken to),
        and knows its parallel degree; by the worker's own rates otherwise."""
        if profile is not None and heartbeat.profile in ("", profile.name):
            costs = build_profile_costs(profile, heartbeat.parallel_degree, scale)
            if costs is not None:
                return cls(costs, None)
        rates = MeasuredRates.of(heartbeat)
        return cls(_build(rates, heartbeat), rates)

    @property
    def are_of_profile(self) -> bool:
        return self.rates is None

    def follow(self, heartbeat: Heartbeat) -> bool:
        """Take newer rates in; whether the costs were built anew."""
        if self.rates is None:
            return False
        rates = MeasuredRates.of(heartbeat)
        if not rates.have_moved_from(self.rates):
            return False
        self.rates = rates
        self.costs = _build(rates, heartbeat)
        return True


def _build(rates: MeasuredRates, heartbeat: Heartbeat) -> StepCosts:
    return build_measured_costs(
        rates,
        parallel_degree=heartbeat.parallel_degree,
        num_kv_tokens=heartbeat.num_blocks * heartbeat.block_size,
    )
