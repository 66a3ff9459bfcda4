"""What is refused before anything is started: wrong parameters, and more than the cluster can take.

Every refusal is an AmpdError that names what to change, or when to come back.
"""

from __future__ import annotations

import math

from shared.core.patience import measure_excess_wait_s
from shared.core.routing import RoutingDecision
from shared.core.session import Session
from shared.core.state import State
from shared.core.token_bytes import check_token_ids, count_tokens
from shared.errors import AmpdError, ErrorCode
from shared.messages import OpenSession, SamplingParams, Slo, StopConditions, SubmitRound

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 64
MAX_KEY_LENGTH = 256
MAX_TEMPERATURE = 100.0
RETRY_AFTER_S = 1.0
MIN_RETRY_S, MAX_RETRY_S = 0.1, 30.0


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AmpdError(ErrorCode.INVALID_REQUEST, message)


def check_open(state: State, request: OpenSession) -> None:
    _check_slo(request.slo)
    limit_s = state.config.max_idle_timeout_s
    _require(
        0 < request.idle_timeout_s <= limit_s,
        f"idle_timeout_s must be in (0, {limit_s:g}], got {request.idle_timeout_s!r}",
    )


def admit_session(state: State, tenant: str) -> None:
    config = state.config
    if len(state.sessions) >= config.max_sessions:
        raise AmpdError(
            ErrorCode.OVERLOADED,
            f"{config.max_sessions} sessions are open, the limit of this cluster: close some, or try later",
            retry_after_s=RETRY_AFTER_S,
        )
    if state.sessions_of_tenant[tenant] >= config.max_sessions_per_tenant:
        raise AmpdError(
            ErrorCode.OVERLOADED,
            f"{config.max_sessions_per_tenant} sessions of this tenant are open, its limit: close some",
            retry_after_s=RETRY_AFTER_S,
        )


def check_round(state: State, session: Session, request: SubmitRound) -> None:
    """Everything about a round but its tokens."""
    _check_sampling(request.sampling)
    _check_stop(request.stop, session.opened.vocab_size)
    if request.slo is not None:
        _check_slo(request.slo)
    limit_s = state.config.max_deadline_s
    _require(
        0 < request.deadline_s <= limit_s,
        f"deadline_s must be in (0, {limit_s:g}], got {request.deadline_s!r}",
    )
    _require(
        len(request.idempotency_key) <= MAX_KEY_LENGTH,
        f"idempotency_key must have at most {MAX_KEY_LENGTH} characters",
    )
    limit = state.config.max_rounds_per_session
    _require(session.num_rounds < limit, f"the session has had its {limit} rounds: open a new one")


def check_tokens(session: Session, request: SubmitRound, token_ids: bytes) -> None:
    check_token_ids(token_ids, session.opened.vocab_size)
    num_input, num_output = count_tokens(token_ids), request.stop.max_output_tokens
    limit = session.opened.max_context_tokens
    if session.num_tokens + num_input + num_output > limit:
        raise AmpdError(
            ErrorCode.CONTEXT_TOO_LONG,
            f"history {session.num_tokens} + input {num_input} + max_output_tokens {num_output} tokens exceed the "
            f"context of {limit}: send less, ask for less, or open a new session",
        )


def admit_round(state: State) -> None:
    limit = state.config.max_rounds_in_flight
    if state.num_rounds_in_flight >= limit:
        raise AmpdError(
            ErrorCode.OVERLOADED,
            f"{limit} rounds are in flight, the limit of this cluster: try again later",
            retry_after_s=RETRY_AFTER_S,
        )


def admit_ttft(state: State, decision: RoutingDecision, slo: Slo, waited_s: float) -> None:
    """Refuse a session's first round that would wait far past its TTFT objective, whatever its best option."""
    if not state.config.scheduling.admission:
        return
    factor = state.config.admission_factor
    excess_s = measure_excess_wait_s(decision.options, slo, waited_s, factor)
    if excess_s <= 0.0:
        return
    state.counters["rounds_not_admitted"] += 1
    ttft_s = waited_s + min(option.total_s for option in decision.options)
    raise AmpdError(
        ErrorCode.OVERLOADED,
        f"the first token would come after {ttft_s:.3g} s, more than {factor:g} times the objective of {slo.ttft_s:g} "
        "s: try again later, or set a larger slo.ttft_s",
        retry_after_s=max(MIN_RETRY_S, min(MAX_RETRY_S, excess_s)),
    )


def explain_no_placement(state: State, model: str, num_needed_tokens: int) -> AmpdError:
    """Why no decode worker can take a round that may need KV for `num_needed_tokens`."""
    alive = state.fleet.list_decode(model, state.now)
    if not alive:
        return AmpdError(
            ErrorCode.NO_DECODE_WORKER,
            "no decode worker is ready: start one, or try again later",
            retry_after_s=state.config.heartbeat_timeout_s,
        )
    largest = max(worker.num_kv_tokens for worker in alive)
    if num_needed_tokens > largest:
        return AmpdError(
            ErrorCode.NO_CAPACITY,
            f"the round may need KV for {num_needed_tokens} tokens, the largest decode worker holds {largest}: send "
            "less, ask for fewer output tokens, or start a worker with more KV memory",
        )
    return AmpdError(
        ErrorCode.NO_CAPACITY,
        "the KV memory of every decode worker is promised to rounds in flight: try again later",
        retry_after_s=RETRY_AFTER_S,
    )


def _check_slo(slo: Slo) -> None:
    for name, value in (("ttft_s", slo.ttft_s), ("itl_s", slo.itl_s)):
        _require(0 < value < math.inf, f"slo.{name} must be a positive number of seconds, got {value!r}")


def _check_sampling(sampling: SamplingParams) -> None:
    _require(
        0 <= sampling.temperature <= MAX_TEMPERATURE,
        f"sampling.temperature must be in [0, {MAX_TEMPERATURE:g}], got {sampling.temperature!r}",
    )
    _require(0 < sampling.top_p <= 1, f"sampling.top_p must be in (0, 1], got {sampling.top_p!r}")
    _require(0 <= sampling.top_k < 2**31, f"sampling.top_k must be 0 (off) or positive, got {sampling.top_k}")
    seed = sampling.seed
    _require(seed is None or 0 <= seed < 2**63, f"sampling.seed must be in [0, 2**63), got {seed}")


def _check_stop(stop: StopConditions, vocab_size: int) -> None:
    _require(
        1 <= stop.max_output_tokens < 2**31,
        f"stop.max_output_tokens must be at least 1, got {stop.max_output_tokens}",
    )
    _require(
        len(stop.stop) <= MAX_STOP_STRINGS,
        f"stop.stop may have at most {MAX_STOP_STRINGS} strings, got {len(stop.stop)}",
    )
    for text in stop.stop:
        _require(
            1 <= len(text) <= MAX_STOP_LENGTH,
            f"a stop string must have 1 to {MAX_STOP_LENGTH} characters, got {len(text)}",
        )
    _require(
        len(stop.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
        f"stop.stop_token_ids may have at most {MAX_STOP_TOKEN_IDS} ids, got {len(stop.stop_token_ids)}",
    )
    for token_id in stop.stop_token_ids:
        _require(
            0 <= token_id < vocab_size,
            f"a stop token id must be in [0, {vocab_size}), got {token_id}",
        )
