"""Why rounds were prefilled where they were: their routing decisions, predicted against measured."""

from __future__ import annotations

from shared.core.routing import OptionEstimate, RoutingDecision
from shared.core.session import EndedRound, RoundInFlight, Session
from shared.core.state import State
from shared.core.types import SessionKey
from shared.errors import AmpdError, ErrorCode
from shared.messages import ExplainSession, OptionExplained, RoundExplained, SessionExplained, Slo, Usage

NOT_SEEN = "not known: the round was placed before this coordinator started"


def explain_session(state: State, request: ExplainSession) -> SessionExplained:
    """The newest rounds of an open session, or of one that was closed lately. Raises UNKNOWN_SESSION."""
    key = SessionKey(request.tenant, request.session)
    session = state.sessions.get(key)
    if session is not None:
        return describe_decisions(state, session)
    if key in state.explained:
        return state.explained[key]
    raise AmpdError(
        ErrorCode.UNKNOWN_SESSION,
        f"session {key.session!r} of tenant {key.tenant!r} is not open, nor among the {state.config.closed_explained} "
        "that were closed last: check its name and --tenant",
    )


def keep_explained(state: State, session: Session) -> None:
    """The session is closed: its explanation stays for a while."""
    state.explained.pop(session.key, None)
    state.explained[session.key] = describe_decisions(state, session)
    while len(state.explained) > state.config.closed_explained:
        del state.explained[next(iter(state.explained))]


def describe_decisions(state: State, session: Session) -> SessionExplained:
    newest = state.config.decisions_kept
    explained = [_explain_ended(ended) for ended in list(session.rounds.values())[-newest:]]
    if session.in_flight is not None:
        explained = [*explained[-newest + 1 :], _explain_running(session.in_flight)]
    return SessionExplained(
        session=session.key.session,
        policy=state.config.scheduling.name,
        rounds=tuple(one for one in explained if one is not None),
    )


def _explain_ended(ended: EndedRound) -> RoundExplained | None:
    if ended.decision is not None:
        return _explain(
            ended.index,
            ended.attempt,
            ended.decision,
            ended.slo,
            ttft_s=ended.ttft_s,
            tpot_s=ended.tpot_s,
            usage=ended.usage,
        )
    if ended.usage is None:
        return None
    return RoundExplained(
        round=ended.index,
        attempt=ended.attempt,
        placement=ended.usage.prefill,
        worker_id=ended.usage.prefill_worker,
        reason=NOT_SEEN,
        options=(),
        chosen_index=-1,
        slo=ended.slo,
        ttft_s=ended.ttft_s,
        tpot_s=ended.tpot_s,
        usage=ended.usage,
    )


def _explain_running(running: RoundInFlight) -> RoundExplained | None:
    if running.decision is None:
        return None
    ttft_s = None
    if running.first_token_at is not None and not running.recovered:
        ttft_s = running.first_token_at - running.received_at
    return _explain(running.index, running.attempt, running.decision, running.started.slo, ttft_s=ttft_s)


def _explain(
    index: int,
    attempt: int,
    decision: RoutingDecision,
    slo: Slo,
    *,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    usage: Usage | None = None,
) -> RoundExplained:
    return RoundExplained(
        round=index,
        attempt=attempt,
        placement=decision.placement,
        worker_id=decision.worker_id,
        reason=decision.reason,
        options=tuple(map(_explain_option, decision.options)),
        chosen_index=decision.options.index(decision.chosen),
        slo=slo,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        usage=usage,
    )


def _explain_option(option: OptionEstimate) -> OptionExplained:
    return OptionExplained(
        placement=option.placement,
        worker_id=option.worker_id,
        num_new_tokens=option.num_new_tokens,
        num_moved_tokens=option.num_moved_tokens,
        windowed_s=option.windowed_s,
        queue_s=option.queue_s,
        transfer_s=option.transfer_s,
        prefill_s=option.prefill_s,
        on_time=option.on_time,
        disturbed=option.disturbed,
    )
