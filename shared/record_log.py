"""Each session's append-only record: what the coordinator folds after a restart.

A record's sequence is its place in the whole log. A writer says which record of the session it takes to be the
last; a stale writer (an owner that was replaced and does not know it) is refused with NOT_OWNER.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

import msgspec
import nats.errors

from shared import subjects
from shared.core.types import SessionKey
from shared.errors import AmpdError, BusError, ErrorCode, NoResponders
from shared.log import get_logger
from shared.nats_bus import NatsBus

_HEADER_BYTES = 512  # room for our headers: they count towards max_payload
_WRONG_LAST_SEQUENCE = (10071, 10164)
_STREAM_FULL = (10047, 10077)  # JetStream's storage; this stream's max_bytes
_DUPLICATE_WINDOW_S = 120.0
_CONSUMER_IDLE_S = 30.0
_BATCH_MESSAGES = 512
_BATCH_BYTES = 16 * 1024 * 1024
_BATCH_TIMEOUT_S = 5.0
_API_TIMEOUT_S = 5.0
_NOTHING_LEFT = "404"
_LOAD_ATTEMPTS = 5
_RETRY_WAIT_S = 0.1
_log = get_logger("shared.record_log")


Record = tuple[SessionKey, int, bytes]  # session, sequence, data


class RecordLog(Protocol):
    async def append(self, key: SessionKey, data: bytes, *, expected_sequence: int | None) -> int:
        """Store `data` as the session's newest record and return its sequence (from 1).

        expected_sequence: sequence of the session's last record, 0 when it has none, None to append in any case.
        Raises AmpdError NOT_OWNER if the session's last record is another one (nothing is stored), NO_CAPACITY if
        the log is full (nothing is stored), INVALID_REQUEST if `data` is too large, and BusError if the log could
        not be reached: then the record may or may not have been stored, and the session must be loaded again.
        """

    def load(self) -> AsyncIterator[Record]:
        """(session, sequence, data) of everything stored, in order; ends at the log's end. Raises BusError."""

    async def purge(self, key: SessionKey) -> None:
        """Forget the session's records; its expected_sequence is 0 again. Raises BusError."""


class _ApiError(msgspec.Struct):
    description: str = ""
    code: int = 0
    err_code: int = 0


class _PubAck(msgspec.Struct):
    seq: int = 0
    error: _ApiError | None = None


class _StreamState(msgspec.Struct, frozen=True):
    messages: int = 0
    last_seq: int = 0


class _StoredMessage(msgspec.Struct, frozen=True):
    seq: int = 0
    hdrs: bytes = b""


class _ApiReply(msgspec.Struct):
    """The fields that we read, of any JetStream API answer."""

    error: _ApiError | None = None
    name: str = ""
    state: _StreamState = _StreamState()
    message: _StoredMessage = _StoredMessage()


_ACK_DECODER = msgspec.json.Decoder(_PubAck)
_API_DECODER = msgspec.json.Decoder(_ApiReply)


class JetStreamRecordLog:
    """One JetStream stream, one subject a session, files on the server's disk. Made by `open`.

    What an acknowledgement promises: the record is in the server's file (written, in the page cache), so kill -9 of
    the server or of any client loses nothing. It is fsynced within the server's `sync_interval` (NatsServer sets 1 s;
    the server's own default is 2 minutes), so a power cut or a kernel crash may lose the last second. With
    `sync_interval: always` every acknowledgement waits for fsync.
    """

    def __init__(self, bus: NatsBus, config: dict[str, Any], *, append_timeout_s: float, append_attempts: int) -> None:
        self._bus = bus
        self._config = config
        self._stream: str = config["name"]
        self._append_timeout_s = append_timeout_s
        self._append_attempts = append_attempts

    @classmethod
    async def open(
        cls,
        bus: NatsBus,
        *,
        stream: str = subjects.RECORD_STREAM,
        max_bytes: int = 4 << 30,
        max_age_s: float = 7 * 86_400.0,
        append_timeout_s: float = 2.0,
        append_attempts: int = 5,
    ) -> JetStreamRecordLog:
        """Open the stream, making it if need be. Raises BusError.

        A full log refuses new records (NO_CAPACITY); it never drops old ones. Records older than max_age_s go, so
        it must exceed the longest life of a session. An append is tried append_attempts times of append_timeout_s,
        well within the two minutes for which the server recognises a repeated message id.
        """
        # an attempt waits for the connection, for its acknowledgement, and before the next
        if append_attempts * (2 * append_timeout_s + _RETRY_WAIT_S * append_attempts) > _DUPLICATE_WINDOW_S:
            raise ValueError(f"an append must not be tried for more than {_DUPLICATE_WINDOW_S:.3g} s")
        config = {
            "name": stream,
            "subjects": [subjects.RECORDS],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "max_bytes": max_bytes,
            "max_age": int(max_age_s * 1e9),
            "duplicate_window": int(_DUPLICATE_WINDOW_S * 1e9),
            "num_replicas": 1,
        }
        log = cls(bus, config, append_timeout_s=append_timeout_s, append_attempts=append_attempts)
        await log._ensure_stream()
        return log

    async def append(self, key: SessionKey, data: bytes, *, expected_sequence: int | None) -> int:
        """RecordLog.append. A retry carries the same message id, so the record is stored once."""
        if len(data) + _HEADER_BYTES > self._bus.max_payload:
            raise AmpdError(
                ErrorCode.INVALID_REQUEST,
                f"a record of {len(data):,} bytes exceeds the limit of {self._bus.max_payload - _HEADER_BYTES:,} bytes",
            )
        subject = subjects.record(*key)
        message_id = secrets.token_hex(12)
        headers = {"Nats-Msg-Id": message_id, "Nats-Expected-Stream": self._stream}
        if expected_sequence is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected_sequence)
        problem = ""
        for attempt in range(1, self._append_attempts + 1):
            try:
                await self._bus.wait_connected(timeout_s=self._append_timeout_s)
                reply = await self._bus.request(subject, data, timeout_s=self._append_timeout_s, headers=headers)
                ack = _ACK_DECODER.decode(reply)
                if ack.error is None:
                    return ack.seq
                if ack.error.err_code in _WRONG_LAST_SEQUENCE and expected_sequence is not None:
                    # The server checks this before the message id: it may be our own earlier attempt that it found.
                    own = await self._find_own_record(subject, expected_sequence, message_id) if attempt > 1 else 0
                    if own:
                        return own
                    raise _not_owner(key, expected_sequence, ack.error.description)
                if ack.error.err_code in _STREAM_FULL:
                    raise _log_full(ack.error.description)
                problem = ack.error.description
            except NoResponders as error:  # the server came back with an empty store
                problem = error.message
                with contextlib.suppress(BusError):  # the next attempt tells
                    await self._ensure_stream()
            except BusError as error:
                problem = error.message
            _log.warning("append not acknowledged", session=key.session, attempt=attempt, problem=problem)
            await asyncio.sleep(_RETRY_WAIT_S * attempt)
        raise BusError(
            ErrorCode.BUS_UNAVAILABLE,
            f"the session log did not acknowledge a record in {self._append_attempts} attempts ({problem}):"
            " it may or may not have been stored",
        )

    async def load(self) -> AsyncIterator[Record]:
        """RecordLog.load; goes on where it was if the connection or the server is lost on the way."""
        next_sequence = 1
        attempt = 1
        while True:
            try:
                # aclosing: an inner generator is not closed by the end of the outer one
                async with contextlib.aclosing(self._load_from(next_sequence)) as records:
                    async for key, sequence, data in records:
                        next_sequence = sequence + 1
                        attempt = 1  # only attempts without progress count
                        yield key, sequence, data
                return
            except (nats.errors.Error, BusError, TimeoutError) as error:
                if attempt == _LOAD_ATTEMPTS:
                    raise BusError(
                        ErrorCode.BUS_UNAVAILABLE, f"cannot load the session log: {_explain(error)}"
                    ) from error
                _log.warning("loading the session log is interrupted", attempt=attempt, error=_explain(error))
                attempt += 1
                await asyncio.sleep(_RETRY_WAIT_S * attempt)
                await self._bus.wait_connected(timeout_s=_BATCH_TIMEOUT_S)

    async def purge(self, key: SessionKey) -> None:
        await self._call_api(f"STREAM.PURGE.{self._stream}", {"filter": subjects.record(*key)})

    # -------------------------------------------------------------------------------- internals

    async def _call_api(self, name: str, body: dict[str, Any]) -> _ApiReply:
        """Call $JS.API.<name>. Raises BusError when it is not reached or says no, except "not found" (404)."""
        reply = _API_DECODER.decode(
            await self._bus.request(f"$JS.API.{name}", msgspec.json.encode(body), timeout_s=_API_TIMEOUT_S)
        )
        if reply.error is not None and reply.error.code != 404:
            raise BusError(ErrorCode.BUS_UNAVAILABLE, f"JetStream {name}: {reply.error.description}")
        return reply

    async def _ensure_stream(self) -> None:
        """Make the stream, or bring the limits of the one that exists up to date."""
        existing = await self._call_api(f"STREAM.INFO.{self._stream}", {})
        verb = "UPDATE" if existing.error is None else "CREATE"
        await self._call_api(f"STREAM.{verb}.{self._stream}", self._config)

    async def _find_own_record(self, subject: str, expected_sequence: int, message_id: str) -> int:
        """Sequence of the record that followed expected_sequence on `subject` if it has message_id, else 0."""
        reply = await self._call_api(
            f"STREAM.MSG.GET.{self._stream}", {"seq": expected_sequence + 1, "next_by_subj": subject}
        )
        return reply.message.seq if f"Nats-Msg-Id: {message_id}\r\n".encode() in reply.message.hdrs else 0

    async def _load_from(self, start_sequence: int) -> AsyncGenerator[Record, None]:
        """Read by pull requests of bounded size through a consumer that ends with us."""
        state = (await self._call_api(f"STREAM.INFO.{self._stream}", {})).state
        if state.messages == 0 or state.last_seq < start_sequence:
            return
        config = {
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": start_sequence,
            "ack_policy": "none",
            "replay_policy": "instant",
            "mem_storage": True,
            "inactive_threshold": int(_CONSUMER_IDLE_S * 1e9),
        }
        created = await self._call_api(
            f"CONSUMER.CREATE.{self._stream}", {"stream_name": self._stream, "config": config}
        )
        try:
            async with contextlib.aclosing(self._read_consumer(created.name)) as records:
                async for record in records:
                    yield record
        finally:
            with contextlib.suppress(BusError):  # it ends by itself after 30 s
                await self._call_api(f"CONSUMER.DELETE.{self._stream}.{created.name}", {})

    async def _read_consumer(self, consumer: str) -> AsyncGenerator[Record, None]:
        client = self._bus.client
        arrived: asyncio.Queue[Any] = asyncio.Queue(2 * _BATCH_MESSAGES)
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox, cb=arrived.put)
        pull = msgspec.json.encode({"batch": _BATCH_MESSAGES, "max_bytes": _BATCH_BYTES, "no_wait": True})
        delivered = 0
        num_pending = 1
        try:
            while num_pending:
                before = delivered
                await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer}", pull, reply=inbox)
                for _ in range(_BATCH_MESSAGES):
                    async with asyncio.timeout(_BATCH_TIMEOUT_S):
                        message = await arrived.get()
                    status = _status(message)
                    if status == _NOTHING_LEFT:
                        return
                    if status and delivered == before:
                        # no batch limit reached, then: the server was restarted and the consumer is gone
                        raise BusError(ErrorCode.BUS_UNAVAILABLE, f"the server ended the reading with {status}")
                    if status:
                        break
                    place = message.metadata
                    delivered += 1
                    if place.sequence.consumer != delivered:
                        raise BusError(ErrorCode.BUS_UNAVAILABLE, "messages were lost on the way")
                    num_pending = place.num_pending
                    yield (
                        SessionKey(*subjects.parse_record(message.subject)),
                        place.sequence.stream,
                        message.data,
                    )
        finally:
            if not client.is_closed:
                await subscription.unsubscribe()


def _status(message: Any) -> str:
    """The code of a status message, such as 409 at the limits of a pull request; "" for a record."""
    return "" if message.data or not message.headers else str(message.headers.get("Status", ""))


def _explain(error: Exception) -> str:
    return str(error) or type(error).__name__


class MemoryRecordLog:
    """A RecordLog in this process. It survives the coordinator object that writes to it, not the process."""

    def __init__(self, *, max_bytes: int = 1 << 30) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._sequence = 0
        self._records: dict[int, tuple[SessionKey, bytes]] = {}
        self._last: dict[SessionKey, int] = {}

    async def append(self, key: SessionKey, data: bytes, *, expected_sequence: int | None) -> int:
        last = self._last.get(key, 0)
        if expected_sequence is not None and expected_sequence != last:
            raise _not_owner(key, expected_sequence, f"it is {last}")
        if self._num_bytes + len(data) > self._max_bytes:
            raise _log_full(f"{self._max_bytes:,} bytes")
        self._sequence += 1
        self._num_bytes += len(data)
        self._records[self._sequence] = (key, data)
        self._last[key] = self._sequence
        return self._sequence

    async def load(self) -> AsyncIterator[Record]:
        for sequence, (key, data) in list(self._records.items()):
            yield key, sequence, data

    async def purge(self, key: SessionKey) -> None:
        if self._last.pop(key, 0):
            purged = [sequence for sequence, (owner, _) in self._records.items() if owner == key]
            self._num_bytes -= sum(len(self._records.pop(sequence)[1]) for sequence in purged)


def _not_owner(key: SessionKey, expected_sequence: int, found: str) -> AmpdError:
    return AmpdError(
        ErrorCode.NOT_OWNER,
        f"session {key.session}: record {expected_sequence} is not the last one ({found}); another coordinator has"
        " written to it, or the log has lost records: load the session again",
    )


def _log_full(limit: str) -> AmpdError:
    return AmpdError(ErrorCode.NO_CAPACITY, f"the session log is full ({limit}): raise its limit or close sessions")
