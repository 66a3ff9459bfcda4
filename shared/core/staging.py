"""Anticipatory staging: while an agent's tool runs, the newest KV of its session moves ahead to the prefill worker that
holds the most of it, so that the next round's prefill finds it there.

    round ends -> GrantHistory to the decode worker -> HistoryGranted -> StageKv to the holder -> KvStaged

Nothing waits for it: one that fails, or that the next round overtakes, is counted and forgotten.
"""

from __future__ import annotations

from shared.core.fleet import WorkerState
from shared.core.records import WorkerRef
from shared.core.residency import describe_resident, note_resident
from shared.core.session import Session
from shared.core.state import Staging, State
from shared.core.types import SessionKey
from shared.messages import Ack, GrantHistory, HistoryGranted, KvStaged, Message, StageKv


def begin_staging(state: State, session: Session) -> None:
    """A round has ended: if a prefill worker holds a part of the session and lacks enough, ask for the rest."""
    config = state.config
    if not config.scheduling.stages or session.closing or session.binding is None or session.key in state.staging:
        return
    decode = session.binding.worker
    if not decode.alive:
        return
    holder = _find_holder(state, session, decode)
    num_held = session.num_tokens - 1  # the last token's KV is computed with the next round
    if holder is None or num_held - session.resident[holder.ref] < config.min_staged_tokens:
        return
    if len(state.staging) >= config.max_staging_in_flight:
        state.counters["stagings_skipped"] += 1
        return
    state.staging[session.key] = Staging(decode.ref, holder.ref, state.now + config.staging_timeout_s)
    state.counters["stagings_begun"] += 1
    state.send(
        decode,
        session.key,
        GrantHistory(
            tenant=session.key.tenant,
            session=session.key.session,
            incarnation=decode.incarnation,
            num_tokens=session.num_tokens,
        ),
    )


def _find_holder(state: State, session: Session, decode: WorkerState) -> WorkerState | None:
    """The worker that holds most of the session's KV and may prefill for it."""
    best: WorkerState | None = None
    for ref, num_tokens in session.resident.items():
        worker = state.fleet.find(ref)
        if (
            worker is not None
            and num_tokens > 0
            and worker.takes_work(state.now)
            and worker.load.takes_prefill
            and worker.heartbeat.layout_hash == decode.heartbeat.layout_hash
            and (best is None or num_tokens > session.resident[best.ref])
        ):
            best = worker
    return best


def on_staging_reply(state: State, key: SessionKey, reply: Message) -> None:
    """The decode worker's answer to GrantHistory, or the holder's to StageKv."""
    staging = state.staging.get(key)
    if staging is None:
        return
    if isinstance(reply, HistoryGranted) and not staging.granted:
        _stage(state, key, staging, reply)
    elif not (isinstance(reply, Ack) and staging.granted):
        abandon_staging(state, key)


def _stage(state: State, key: SessionKey, staging: Staging, granted: HistoryGranted) -> None:
    session = state.sessions[key]
    holder = state.fleet.find(staging.holder)
    num_tokens = min(granted.num_tokens, session.num_tokens)
    if (
        session.in_flight is not None  # overtaken: the round moves what it needs itself
        or holder is None
        or session.binding is None
        or session.binding.worker.ref != staging.decode
        or granted.history.worker_id != staging.decode.worker_id
        or num_tokens <= session.resident.get(staging.holder, 0)
    ):
        abandon_staging(state, key)
        return
    staging.granted = True
    state.send(
        holder,
        key,
        StageKv(
            tenant=key.tenant,
            session=key.session,
            incarnation=holder.incarnation,
            resident=describe_resident(session, staging.holder, num_tokens),
            num_tokens=num_tokens,
            checksum=session.checksum_until(num_tokens),
            history=granted.history,
            decode_worker=staging.decode.worker_id,
            decode_incarnation=staging.decode.incarnation,
        ),
    )


def on_kv_staged(state: State, report: KvStaged) -> None:
    key, ref = SessionKey(report.tenant, report.session), WorkerRef(report.worker_id, report.incarnation)
    session = state.sessions.get(key)
    if session is not None:
        note_resident(state, session, ref, min(report.num_resident_tokens, session.num_tokens))
    staging = state.staging.get(key)
    if staging is None or staging.holder != ref:
        return
    if report.error is not None:
        abandon_staging(state, key)
        return
    del state.staging[key]
    state.counters["stagings_done"] += 1


def abandon_staging(state: State, key: SessionKey) -> None:
    if state.staging.pop(key, None) is not None:
        state.counters["stagings_failed"] += 1


def expire_stagings(state: State) -> None:
    """Give up those that have not been heard of for too long, or whose workers are gone."""
    for key, staging in list(state.staging.items()):
        is_lost = state.fleet.find(staging.decode) is None or state.fleet.find(staging.holder) is None
        if is_lost or state.now >= staging.until:
            abandon_staging(state, key)
