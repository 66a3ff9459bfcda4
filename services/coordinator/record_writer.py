"""Appends to sessions' durable records: fenced by sequence, and certain about what was stored."""

from __future__ import annotations

import asyncio

from shared.core.events import SessionRecord
from shared.core.records import RecordEntry, decode_entry, encode_entry
from shared.core.types import SessionKey
from shared.errors import AmpdError, BusError, ErrorCode
from shared.record_log import RecordLog

MAX_PURGE_ATTEMPTS = 5
PURGE_RETRY_S = 1.0


class RecordWriter:
    """The core sends one entry of a session at a time; different sessions append at once.

    An append whose outcome is unknown leaves its session in doubt: before the next append the log is read to see
    whether the entry was stored, so that a coordinator neither fences itself out nor overwrites a new owner.
    """

    def __init__(self, log: RecordLog) -> None:
        self._log = log
        self._sequences: dict[SessionKey, int] = {}
        self._in_doubt: dict[SessionKey, bytes] = {}  # the entry that may or may not be stored
        self._reading: asyncio.Task[dict[SessionKey, tuple[int, bytes]]] | None = None

    async def load(self) -> tuple[SessionRecord, ...]:
        """Every record in the log. Raises AmpdError for an entry that cannot be read: it names the session."""
        entries: dict[SessionKey, list[RecordEntry]] = {}
        async for key, sequence, data in self._log.load():
            try:
                entries.setdefault(key, []).append(decode_entry(data))
            except AmpdError as error:
                raise AmpdError(error.code, f"session {key.session!r}: {error.message}") from error
            self._sequences[key] = sequence
        return tuple(SessionRecord(key, tuple(of_session)) for key, of_session in entries.items())

    async def append(self, key: SessionKey, entry: RecordEntry) -> None:
        """Raises AmpdError: NOT_OWNER when somebody else has written, otherwise it may be tried again."""
        data = encode_entry(entry)
        if key in self._in_doubt and await self._was_stored(key, data):
            return
        try:
            self._sequences[key] = await self._log.append(key, data, expected_sequence=self._sequences.get(key, 0))
        except BusError:
            self._in_doubt[key] = data
            raise

    async def purge(self, key: SessionKey) -> None:
        """Forget a closed session. If the log cannot be reached the record stays: a restart purges it."""
        for attempt in range(1, MAX_PURGE_ATTEMPTS + 1):
            try:
                await self._log.purge(key)
                break
            except BusError:
                if attempt < MAX_PURGE_ATTEMPTS:
                    await asyncio.sleep(PURGE_RETRY_S * attempt)
        self.forget(key)

    def forget(self, key: SessionKey) -> None:
        self._sequences.pop(key, None)
        self._in_doubt.pop(key, None)

    async def _was_stored(self, key: SessionKey, data: bytes) -> bool:
        """Settle a doubt from the log itself. Raises NOT_OWNER, or BusError when it cannot be read."""
        last_sequence, last_data = (await self._read_last()).get(key, (0, b""))
        expected = self._sequences.get(key, 0)
        if last_sequence != expected and last_data != self._in_doubt[key]:
            raise AmpdError(
                ErrorCode.NOT_OWNER, f"session {key.session}: another coordinator has written to its record"
            )
        doubtful = self._in_doubt.pop(key)
        self._sequences[key] = last_sequence
        return last_sequence != expected and doubtful == data

    async def _read_last(self) -> dict[SessionKey, tuple[int, bytes]]:
        """The last entry of every session in doubt; sessions that ask at the same time share one reading."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_log())
        return await asyncio.shield(self._reading)

    async def _read_log(self) -> dict[SessionKey, tuple[int, bytes]]:
        last: dict[SessionKey, tuple[int, bytes]] = {}
        async for key, sequence, data in self._log.load():
            if key in self._in_doubt:
                last[key] = (sequence, data)
        return last
