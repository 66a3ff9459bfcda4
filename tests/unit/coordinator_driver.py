"""Drives the coordinator's core for the tests of its rules: events in, commands out, invariants checked after each."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from heartbeats import make_heartbeat

from shared.core.commands import (
    AppendRecord,
    Command,
    Reply,
    SendToWorker,
)
from shared.core.coordinator import Coordinator
from shared.core.coordinator_config import CoordinatorConfig
from shared.core.events import (
    ClientRequested,
    CommandReplied,
    Event,
    HeartbeatSeen,
    RecordAppended,
    StreamSeen,
    Ticked,
    WorkerReported,
)
from shared.core.records import RecordEntry
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import (
    ClientRequest,
    ErrorReply,
    KvSource,
    OpenSession,
    PrefillEnded,
    PrefillTask,
    RoundAccepted,
    RoundEnded,
    RoundFinished,
    RoundTokens,
    RunRound,
    RunRoundAck,
    StopConditions,
    SubmitRound,
    TokensInput,
    Usage,
    encode,
    pack_token_ids,
)

KEY = SessionKey("t", "s")
C = TypeVar("C", bound=Command)

USAGE = Usage(
    num_history_tokens=0,
    num_input_tokens=1,
    num_cached_tokens=0,
    num_output_tokens=1,
    prefill="local",
    prefill_worker="d",
    decode_worker="d",
)


class Driver:
    """Feeds a core, records what it wants, and acknowledges appends unless told not to."""

    def __init__(self, **config: Any) -> None:
        self.core = Coordinator(CoordinatorConfig(**config))
        self.now = 0.0
        self.commands: list[Command] = []
        self.entries: list[RecordEntry] = []
        self.appends = True
        self.num_ids = 0

    def feed(self, event: Event) -> None:
        new = self.core.on_event(event, self.now)
        self.core.check_integrity()
        for command in new:
            if isinstance(command, AppendRecord) and self.appends:
                self.entries.append(command.entry)
                self.feed(RecordAppended(key=command.key, append_id=command.append_id))
            else:
                self.commands.append(command)

    def take(self, kind: type[C]) -> list[C]:
        taken = [c for c in self.commands if isinstance(c, kind)]
        self.commands = [c for c in self.commands if not isinstance(c, kind)]
        return taken

    def one(self, kind: type[C]) -> C:
        (only,) = self.take(kind)
        return only

    def sent(self, kind: type[Any]) -> list[SendToWorker]:
        """Commands to workers of one kind, taken; the others stay."""
        wanted = [c for c in self.commands if isinstance(c, SendToWorker) and isinstance(c.message, kind)]
        self.commands = [c for c in self.commands if c not in wanted]
        return wanted

    def beat(self, worker_id: str = "d", **fields: Any) -> None:
        fields.setdefault("role", "prefill" if worker_id.startswith("p") else "decode")
        self.feed(HeartbeatSeen(heartbeat=make_heartbeat(worker_id, **fields)))

    def ask(self, request: ClientRequest, key: SessionKey = KEY, digest: bytes = b"x") -> int:
        self.num_ids += 1
        self.feed(
            ClientRequested(
                request_id=self.num_ids, key=key, request=request, encoding="msgpack", random_seed=77, digest=digest
            )
        )
        return self.num_ids

    def answer(self, request: ClientRequest, **fields: Any) -> Any:
        """The answer that a request gets at once."""
        request_id = self.ask(request, **fields)
        (reply,) = [r for r in self.take(Reply) if r.request_id == request_id]
        return reply.message

    def open(self, *workers: str) -> None:
        for worker_id in workers or ("d",):
            self.beat(worker_id)
        assert self.answer(OpenSession()).session == "s"

    def submit(self, tokens: list[int] | None = None, **fields: Any) -> RunRound:
        """A round that is accepted; the run_round that follows."""
        accepted = self.answer(submit(tokens or [1, 2, 3], **fields))
        assert isinstance(accepted, RoundAccepted), accepted
        (self.run,) = self.sent(RunRound)
        return self.run.message

    def reply(self, command: SendToWorker, reply: Any) -> None:
        self.feed(CommandReplied(command_id=command.command_id, reply=reply))

    def acknowledge_run(self, state: str = "started", cached: int = 0, output: list[int] | None = None) -> None:
        history = source("d") if cached and self.run.message.remote else None
        packed = pack_token_ids(output or [])
        ack = RunRoundAck(state=state, num_cached_tokens=cached, history=history, output_token_ids=packed)
        self.reply(self.run, ack)

    def end(self, output: list[int], error: ErrorReply | None = None, **fields: Any) -> int:
        """round_ended of the newest run_round."""
        self.num_ids += 1
        run = self.run.message
        report = RoundEnded(
            tenant="t",
            session="s",
            round=run.round,
            attempt=run.attempt,
            worker_id=self.run.worker_id,
            incarnation=run.incarnation,
            output_token_ids=pack_token_ids(output),
            finish_reason=None if error else "length",
            usage=None if error else USAGE,
            error=error,
        )
        report = msgspec.structs.replace(report, **fields)
        self.feed(WorkerReported(ack_id=self.num_ids, report=report))
        return self.num_ids

    def end_prefill(self, task: SendToWorker, resident: int = 0, **fields: Any) -> None:
        """prefill_ended of a prefill_task: all went well, and `resident` tokens stay there."""
        self.num_ids += 1
        message = task.message
        assert isinstance(message, PrefillTask)
        report = PrefillEnded(
            tenant="t",
            session="s",
            round=message.round,
            attempt=message.attempt,
            worker_id=task.worker_id,
            incarnation=message.incarnation,
            error=None,
            num_new_tokens=len(message.token_ids) // 4,
            queued_s=0.0,
            transfer_s=0.0,
            prefill_s=0.0,
            kv_bytes_read=0,
            num_resident_tokens=resident,
        )
        self.feed(WorkerReported(ack_id=self.num_ids, report=msgspec.structs.replace(report, **fields)))

    def play_remote_round(self, tokens: list[int], output: list[int], *, cached: int, resident: int) -> PrefillTask:
        """A whole round whose prefill is remote and leaves `resident` tokens there; the task that was sent."""
        self.submit(tokens)
        self.acknowledge_run(cached=cached)
        (task,) = self.sent(PrefillTask)
        self.end_prefill(task, resident)
        self.end(output)
        assert isinstance(task.message, PrefillTask)
        return task.message

    def play_round(self, tokens: list[int], output: list[int]) -> None:
        self.submit(tokens)
        self.acknowledge_run()
        self.end(output)

    def stream(self, *messages: Any) -> None:
        payloads = tuple(encode(message) for message in messages)
        self.feed(StreamSeen(key=KEY, round=messages[0].round, payloads=payloads))

    def tick(self, by_s: float, *workers: str) -> None:
        """Time passes in steps shorter than a stall, while the workers named send heartbeats."""
        end = self.now + by_s
        while self.now < end:
            self.now = min(end, self.now + 0.5)
            for worker_id in workers:
                self.beat(worker_id)
            self.feed(Ticked())


def source(worker_id: str) -> KvSource:
    return KvSource(worker_id=worker_id, incarnation=1, endpoints=(), lease_id=1, generation=1, ttl_s=15)


def submit(tokens: list[int], max_output: int = 10, **fields: Any) -> SubmitRound:
    fields.setdefault("stop", StopConditions(max_output_tokens=max_output))
    return SubmitRound(input=TokensInput(token_ids=pack_token_ids(tokens)), **fields)


def tokens_message(start: int, *token_ids: int, attempt: int = 1, round: int = 0) -> RoundTokens:
    return RoundTokens(
        session="s", round=round, attempt=attempt, seq=start, start_index=start, token_ids=pack_token_ids(token_ids)
    )


def finished_message(num_tokens: int, attempt: int = 1) -> RoundFinished:
    return RoundFinished(
        session="s",
        round=0,
        attempt=attempt,
        seq=99,
        num_output_tokens=num_tokens,
        finish_reason="length",
        usage=USAGE,
    )


def error(code: ErrorCode) -> ErrorReply:
    return ErrorReply(code=code, message="because")
