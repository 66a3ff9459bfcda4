"""A worker that follows docs/architecture.md in virtual time: tokens from a hash, KV as a count of positions."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from heartbeats import make_heartbeat

from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    Ack,
    CancelRun,
    DropSession,
    ErrorReply,
    GrantHistory,
    Heartbeat,
    HistoryGranted,
    KvHeld,
    KvSource,
    KvStaged,
    Message,
    NeedTokens,
    PrefillEnded,
    PrefillTask,
    ResidentKv,
    Role,
    RoundEnded,
    RoundFinished,
    RoundTokens,
    RunRound,
    RunRoundAck,
    SetRole,
    StageKv,
    StopConditions,
    Usage,
    pack_token_ids,
    unpack_token_ids,
)

if TYPE_CHECKING:
    from sim_cluster import SimCluster

VOCAB_SIZE = 1000
EOS = 0
MAX_CONTEXT = 4096
PREFILL_S, TOKEN_S, STAGE_S = 0.02, 0.01, 0.005


def compute_token(prompt: list[int], index: int) -> int:
    """Output token `index` of a prompt: the same on every worker, in every attempt."""
    value = zlib.crc32(pack_token_ids([*prompt, index]))
    return EOS if value % 23 == 0 else 1 + value % (VOCAB_SIZE - 1)


def compute_output(prompt: list[int], stop: StopConditions) -> list[int]:
    """The whole output that a fault-free run gives."""
    output: list[int] = []
    while find_finish_reason(output, stop) is None:
        output.append(compute_token(prompt, len(output)))
    return output


def find_finish_reason(output: list[int], stop: StopConditions) -> str | None:
    if output and output[-1] == EOS and not stop.ignore_eos:
        return "stop"
    return "length" if len(output) >= stop.max_output_tokens else None


@dataclass(eq=False)
class SimRun:
    message: RunRound
    num_cached: int
    output: list[int]
    seq: int = 0
    lease: KvSource | None = None
    ended: RoundEnded | None = None
    stopped: bool = False
    prefilled: bool = False
    num_moved: int = 0


@dataclass(eq=False)
class SimSession:
    tokens: list[int] = field(default_factory=list)
    num_kv: int = 0
    run: SimRun | None = None


@dataclass(eq=False)
class SimResident:
    """KV of the first base + len(tokens) positions of a session bound elsewhere, known by their checksums."""

    base: int
    base_checksum: int
    tokens: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.base + len(self.tokens)

    def matches(self, wanted: ResidentKv) -> bool:
        if not self.base <= wanted.num_tokens <= self.num_tokens:
            return False
        known = pack_token_ids(self.tokens[: wanted.num_tokens - self.base])
        return zlib.crc32(known, self.base_checksum) == wanted.checksum


class SimWorker:
    def __init__(self, cluster: SimCluster, worker_id: str, role: Role, incarnation: int) -> None:
        self.cluster = cluster
        self.worker_id = worker_id
        self.role: Role = role
        self.incarnation = incarnation
        self.alive = True
        self.draining = False
        self.had_roles: set[Role] = {role}  # those it was to take counted: a command may come before the new role does
        self.sessions: dict[SessionKey, SimSession] = {}
        self.tasks: dict[tuple[SessionKey, int, int], PrefillTask] = {}
        self.ended_tasks: set[tuple[SessionKey, int, int]] = set()
        self.resident: dict[SessionKey, SimResident] = {}
        self.staging: dict[SessionKey, StageKv] = {}
        self.gone: list[KvHeld] = []
        self.granted: dict[int, SessionKey] = {}  # leases on the KV of sessions that move, until it has been read
        self.num_reused_tokens = 0
        self.num_staged_tokens = 0
        self.heartbeat_seq = 0
        self._beat()

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.cluster.at(self.cluster.now + delay_s, lambda: action() if self.alive else None)

    def _beat(self) -> None:
        self.cluster.deliver_heartbeat(self, self.heartbeat())
        self.later(1.0, self._beat)

    def heartbeat(self) -> Heartbeat:
        self.heartbeat_seq += 1
        gone, self.gone = tuple(self.gone), []
        return make_heartbeat(
            self.worker_id,
            incarnation=self.incarnation,
            role=self.role,
            seq=self.heartbeat_seq,
            model="sim",
            max_context_tokens=MAX_CONTEXT,
            vocab_size=VOCAB_SIZE,
            num_blocks=1024,
            num_free_blocks=1024 - sum(s.num_kv for s in self.sessions.values()) // 16,
            num_sessions=len(self.sessions),
            num_waiting=len(self.tasks),
            queue_num_tokens=sum(len(t.token_ids) // 4 for t in self.tasks.values()),
            prefill_tokens_per_s=1000.0,
            decode_step_s=TOKEN_S,
            kv_bytes_per_s=1e9,
            draining=self.draining,
            num_resident_tokens=sum(resident.num_tokens for resident in self.resident.values()),
            kv_held=gone,
        )

    # ------------------------------------------------------------------------- commands

    def command(self, message: Message) -> Message:
        match message:
            case RunRound():
                return self._run_round(message)
            case PrefillTask():
                return self._prefill_task(message)
            case CancelRun():
                self._cancel_tasks(SessionKey(message.tenant, message.session), message.round, message.attempt)
                return self._cancel_run(message)
            case DropSession():
                key = SessionKey(message.tenant, message.session)
                self._cancel_tasks(key, 10**9, 10**9)
                self.resident.pop(key, None)
                self.staging.pop(key, None)
                session = self.sessions.pop(key, None)
                if session is not None:
                    self._stop_run(session)
                return Ack()
            case GrantHistory():
                return self._grant_history(message)
            case StageKv():
                return self._stage_kv(message)
            case SetRole():
                return self._set_role(message)
        raise AssertionError(f"no worker command: {message}")

    def _set_role(self, message: SetRole) -> Message:
        if message.incarnation != self.incarnation:
            return ErrorReply(code=ErrorCode.WRONG_INCARNATION, message="another process")
        if self.draining:
            return ErrorReply(code=ErrorCode.DRAINING, message="stopping")
        self.role = message.role
        self.cluster.deliver_heartbeat(self, self.heartbeat())
        return Ack()

    def _run_round(self, message: RunRound) -> Message:
        if message.incarnation != self.incarnation:
            return ErrorReply(code=ErrorCode.WRONG_INCARNATION, message="another process")
        assert self.had_roles & {"decode", "both"}, "only decode workers get rounds"
        session = self.sessions.setdefault(SessionKey(message.tenant, message.session), SimSession())
        run = session.run
        if run is not None:
            newest = run.message.round, run.message.attempt
            if newest == (message.round, message.attempt):
                return self._acknowledge(run, "running" if run.ended is None else "finished")
            if newest > (message.round, message.attempt):
                return ErrorReply(code=ErrorCode.STALE_ATTEMPT, message="a newer attempt runs here")
        if self.draining:
            return ErrorReply(code=ErrorCode.DRAINING, message="stopping")
        self._stop_run(session)
        prefix = session.tokens[: message.tokens_start]
        if len(prefix) < message.tokens_start:
            return NeedTokens(num_known_tokens=len(prefix))
        if zlib.crc32(pack_token_ids(prefix)) != message.prefix_checksum:
            return NeedTokens(num_known_tokens=0)
        tokens = prefix + unpack_token_ids(message.token_ids)
        expected = message.num_history_tokens + message.num_input_tokens + message.num_forced_tokens
        assert len(tokens) == expected, "the announced tokens arrive"
        common = 0
        while common < min(len(tokens), session.num_kv) and tokens[common] == session.tokens[common]:
            common += 1
        session.tokens, session.num_kv = tokens, min(common, len(tokens) - 1)
        prompt_length = message.num_history_tokens + message.num_input_tokens
        session.run = run = SimRun(message, session.num_kv, tokens[prompt_length:])
        assert find_finish_reason(run.output, message.stop) is None, "the worker itself ends the round"
        assert message.source is None or message.remote is None, "a session that moves is prefilled where it goes"
        if message.source is not None:
            self.later(STAGE_S, lambda: self._fetch_moved(session, run))
        elif message.remote is None:
            self.later(PREFILL_S, lambda: self._begin_decode(session, run))
        elif session.num_kv > 0:
            run.lease = KvSource(
                worker_id=self.worker_id,
                incarnation=self.incarnation,
                endpoints=(),
                lease_id=self.cluster.take_number(),
                generation=1,
                ttl_s=15.0,
            )
        return self._acknowledge(run, "started")

    def _fetch_moved(self, session: SimSession, run: SimRun) -> None:
        """Read the KV from the worker that the session comes from, if it still has just that; then prefill."""
        message = run.message
        assert message.source is not None
        key, num_tokens = SessionKey(message.tenant, message.session), message.num_source_tokens
        source = self.cluster.workers.get(message.source.worker_id)
        if source is not None and source.lend(message.source, key, session.tokens[:num_tokens], self.cluster):
            run.num_moved = max(0, min(num_tokens, len(session.tokens) - 1) - session.num_kv)
            run.num_cached = session.num_kv = session.num_kv + run.num_moved
            self.cluster.num_moved_tokens += run.num_moved
        elif not run.stopped:
            self.cluster.num_failed_moves += 1
        self.later(PREFILL_S, lambda: self._begin_decode(session, run))

    def lend(self, lease: KvSource, key: SessionKey, tokens: list[int], cluster: SimCluster) -> bool:
        """Whether the KV of these tokens can be read here: once."""
        session = self.sessions.get(key)
        is_granted = lease.incarnation == self.incarnation and self.granted.pop(lease.lease_id, None) == key
        if session is None or not is_granted or cluster.data_plane_is_cut():
            return False
        return session.num_kv >= len(tokens) and session.tokens[: len(tokens)] == tokens

    def _acknowledge(self, run: SimRun, state: str) -> RunRoundAck:
        return RunRoundAck(
            state=state,
            num_cached_tokens=run.num_cached,
            history=run.lease,
            output_token_ids=pack_token_ids(run.output),
        )

    def _cancel_run(self, message: CancelRun) -> Message:
        session = self.sessions.get(SessionKey(message.tenant, message.session))
        run = session.run if session is not None else None
        if session is None or run is None or run.message.round != message.round:
            return Ack()
        if run.message.attempt <= message.attempt:
            self._stop_run(session)
            del session.tokens[run.message.num_history_tokens :]
            session.num_kv = min(session.num_kv, len(session.tokens))
        return Ack()

    def _stop_run(self, session: SimSession) -> None:
        if session.run is not None:
            session.run.stopped = True
            session.run.lease = None
            session.run = None

    def forget_kv(self) -> None:
        """Memory pressure: KV and tokens of idle sessions go, and what is kept for others."""
        gone = list(self.resident)
        self.resident.clear()
        for key, session in list(self.sessions.items()):
            if session.run is None or session.run.ended is not None:
                del self.sessions[key]
                gone.append(key)
        self.gone += [KvHeld(tenant=key.tenant, session=key.session, num_device_tokens=0) for key in gone]

    # --------------------------------------------------------------------------- decode

    def _begin_decode(self, session: SimSession, run: SimRun) -> None:
        if not run.stopped and run.ended is None and not run.prefilled:
            run.prefilled = True
            self._take_token(session, run)

    def _take_token(self, session: SimSession, run: SimRun) -> None:
        if run.stopped or run.ended is not None:
            return
        message = run.message
        prompt = session.tokens[: message.num_history_tokens + message.num_input_tokens]
        token = compute_token(prompt, len(run.output))
        session.num_kv = len(session.tokens)
        session.tokens.append(token)
        run.output.append(token)
        self._publish(
            run,
            RoundTokens(
                session=message.session,
                round=message.round,
                attempt=message.attempt,
                seq=run.seq,
                start_index=len(run.output) - 1,
                token_ids=pack_token_ids([token]),
            ),
        )
        reason = find_finish_reason(run.output, message.stop)
        if reason is None:
            self.later(TOKEN_S, lambda: self._take_token(session, run))
        else:
            self._end(run, reason, None)

    def fail_run(self, key: SessionKey, code: ErrorCode) -> None:
        """The attempt that runs here for a session stops with an error."""
        session = self.sessions.get(key)
        run = session.run if session is not None else None
        if run is not None and run.ended is None:
            run.stopped = True
            self._end(run, None, ErrorReply(code=code, message="injected"))

    def _end(self, run: SimRun, reason: str | None, error: ErrorReply | None) -> None:
        message = run.message
        usage = Usage(
            num_history_tokens=message.num_history_tokens,
            num_input_tokens=message.num_input_tokens,
            num_cached_tokens=run.num_cached,
            num_output_tokens=len(run.output),
            prefill="remote" if message.remote else "local",
            prefill_worker=message.remote.worker_id if message.remote else self.worker_id,
            decode_worker=self.worker_id,
            moved_from=message.source.worker_id if message.source is not None else "",
            num_moved_tokens=run.num_moved,
        )
        run.lease = None
        run.ended = RoundEnded(
            tenant=message.tenant,
            session=message.session,
            round=message.round,
            attempt=message.attempt,
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            output_token_ids=pack_token_ids(run.output),
            finish_reason=reason,
            usage=usage if error is None else None,
            error=error,
        )
        if reason is not None:
            finished = RoundFinished(
                session=message.session,
                round=message.round,
                attempt=message.attempt,
                seq=run.seq,
                num_output_tokens=len(run.output),
                finish_reason=reason,
                usage=usage,
            )
            self._publish(run, finished)
        self.cluster.report_until_acknowledged(self, run.ended)

    def _publish(self, run: SimRun, message: RoundTokens | RoundFinished) -> None:
        run.seq += 1
        self.cluster.publish_stream(SessionKey(run.message.tenant, message.session), message)

    # -------------------------------------------------------------------------- prefill

    def _prefill_task(self, message: PrefillTask) -> Message:
        if message.incarnation != self.incarnation:
            return ErrorReply(code=ErrorCode.WRONG_INCARNATION, message="another process")
        assert self.had_roles & {"prefill", "both"}, "only prefill workers get tasks"
        assert message.token_ids, "a prefill computes at least one token"
        assert (message.history is not None) == (message.num_cached_tokens > 0)
        num_total = message.num_cached_tokens + len(message.token_ids) // 4
        assert message.resident is None or 0 < message.resident.num_tokens < num_total
        key = SessionKey(message.tenant, message.session)
        self.staging.pop(key, None)  # a prefill goes before
        task = key, message.round, message.attempt
        if task in self.tasks or task in self.ended_tasks:
            return Ack()
        if self.draining:
            return ErrorReply(code=ErrorCode.DRAINING, message="stopping")
        self._cancel_tasks(key, message.round, message.attempt - 1)
        self.tasks[task] = message
        self.later(PREFILL_S, lambda: self._compute(task))
        return Ack()

    def _cancel_tasks(self, key: SessionKey, round_index: int, attempt: int) -> None:
        for task in list(self.tasks):
            if task[0] == key and task[1:] <= (round_index, attempt):
                del self.tasks[task]

    def _compute(self, task: tuple[SessionKey, int, int]) -> None:
        """Read the history from the decode worker, compute, hand over: one step, between two living workers."""
        message = self.tasks.get(task)
        if message is None:
            return
        decode = self.cluster.workers.get(message.decode_worker)
        reachable = decode is not None and decode.alive and not self.cluster.data_plane_is_cut()
        error = None
        num_reused = 0
        if not reachable or not decode.accept_prefill(message):
            error = ErrorReply(code=ErrorCode.KV_TRANSFER_FAILED, message="the decode worker does not take it")
        else:
            num_reused = self._use_resident(task[0], message)
        del self.tasks[task]
        self.ended_tasks.add(task)
        self.cluster.report_until_acknowledged(
            self,
            PrefillEnded(
                tenant=message.tenant,
                session=message.session,
                round=message.round,
                attempt=message.attempt,
                worker_id=self.worker_id,
                incarnation=self.incarnation,
                error=error,
                num_new_tokens=len(message.token_ids) // 4 - max(0, num_reused - message.num_cached_tokens),
                queued_s=0.0,
                transfer_s=0.0,
                prefill_s=PREFILL_S,
                kv_bytes_read=0,
                num_resident_tokens=self._count_resident(task[0]),
                num_reused_tokens=num_reused,
            ),
        )

    def _use_resident(self, key: SessionKey, task: PrefillTask) -> int:
        """Tokens of the kept KV that the prefill used; afterwards the whole prompt is kept, if it is to be."""
        held, wanted = self.resident.get(key), task.resident
        num_reused = wanted.num_tokens if held is not None and wanted is not None and held.matches(wanted) else 0
        if held is not None and wanted is not None and num_reused == 0:
            if held.base > wanted.num_tokens:  # a staging ended whose word had not come: a part of it cannot be told
                self.cluster.num_behind += 1
            else:
                self.cluster.num_mismatches += 1
        if task.keep:
            tokens = unpack_token_ids(task.token_ids)
            self.resident[key] = SimResident(task.num_cached_tokens, task.prefix_checksum, tokens)
        self.num_reused_tokens += num_reused
        return num_reused

    def _count_resident(self, key: SessionKey) -> int:
        return self.resident[key].num_tokens if key in self.resident else 0

    # -------------------------------------------------------------------------- staging

    def _grant_history(self, message: GrantHistory) -> Message:
        session = self.sessions.get(SessionKey(message.tenant, message.session))
        if message.incarnation != self.incarnation:
            return ErrorReply(code=ErrorCode.WRONG_INCARNATION, message="another process")
        if session is None or (session.run is not None and session.run.ended is None) or not session.num_kv:
            return ErrorReply(code=ErrorCode.KV_LEASE_INVALID, message="a round runs, or nothing is held")
        history = KvSource(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            endpoints=(),
            lease_id=self.cluster.take_number(),
            generation=1,
            ttl_s=15.0,
        )
        if message.hold:
            self.granted[history.lease_id] = SessionKey(message.tenant, message.session)
        return HistoryGranted(num_tokens=min(message.num_tokens, session.num_kv), history=history)

    def _stage_kv(self, message: StageKv) -> Message:
        if message.incarnation != self.incarnation:
            return ErrorReply(code=ErrorCode.WRONG_INCARNATION, message="another process")
        assert message.resident is None or message.resident.num_tokens < message.num_tokens
        key = SessionKey(message.tenant, message.session)
        self.staging[key] = message
        self.later(STAGE_S, lambda: self._finish_staging(key, message))
        return Ack()

    def _finish_staging(self, key: SessionKey, message: StageKv) -> None:
        """Read the missing KV from the decode worker, if it still has just that conversation."""
        if self.staging.get(key) is not message:
            return
        del self.staging[key]
        decode = self.cluster.workers.get(message.decode_worker)
        session = decode.sessions.get(key) if decode is not None else None
        error = None
        if (
            decode is None
            or decode.incarnation != message.decode_incarnation
            or self.cluster.data_plane_is_cut()
            or session is None
            or session.num_kv < message.num_tokens
            or zlib.crc32(pack_token_ids(session.tokens[: message.num_tokens])) != message.checksum
        ):
            error = ErrorReply(code=ErrorCode.KV_TRANSFER_FAILED, message="the KV has gone")
        else:
            self.num_staged_tokens += message.num_tokens - self._count_resident(key)
            self.resident[key] = SimResident(message.num_tokens, message.checksum)
        self.cluster.report_until_acknowledged(
            self,
            KvStaged(
                tenant=message.tenant,
                session=message.session,
                worker_id=self.worker_id,
                incarnation=self.incarnation,
                num_resident_tokens=self._count_resident(key),
                kv_bytes_read=0,
                error=error,
            ),
        )

    # ------------------------------------------------------------------ the other end

    def accept_prefill(self, task: PrefillTask) -> bool:
        """KV and first token arrive from a prefill worker; False when this attempt does not wait for them."""
        session = self.sessions.get(SessionKey(task.tenant, task.session))
        run = session.run if session is not None else None
        if session is None or run is None or run.stopped or run.ended is not None or run.prefilled:
            return False
        if self.incarnation != task.decode_incarnation:
            return False
        if (run.message.round, run.message.attempt) != (task.round, task.attempt):
            return False
        assert task.num_cached_tokens <= run.num_cached, "the range offered covers the range wanted"
        new = array("i", task.token_ids).tolist()
        assert session.tokens[task.num_cached_tokens :] == new, "the prefill computed the conversation's tokens"
        self._begin_decode(session, run)
        return True
