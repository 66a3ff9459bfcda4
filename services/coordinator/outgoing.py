"""Carrying out the core's commands: each is a task, and reports back with an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.coordinator.input_text import InputText
from services.coordinator.message_reading import read_command_reply
from services.coordinator.record_writer import RecordWriter
from services.coordinator.stream_buffer import StreamBuffer
from services.coordinator.ticket_signing import sign_tickets
from shared import subjects
from shared.bus import Bus
from shared.core.commands import AppendRecord, EncodeInput, SendToWorker
from shared.core.coordinator import Coordinator
from shared.core.events import (
    AppendFailed,
    CommandFailed,
    CommandReplied,
    Event,
    InputEncoded,
    InputRefused,
    RecordAppended,
)
from shared.core.types import SessionKey
from shared.errors import AmpdError, BusError, ErrorCode, NoResponders, RequestTimeout
from shared.log import get_logger
from shared.messages import ErrorReply, SetRole, encode, error_reply

BUS_RETRY_S = 1.0  # a command that could not be sent counts as timed out after this long

log = get_logger(__name__)


class Outgoing:
    """Everything that waits for the bus, the record log or the tokeniser. `feed` takes the outcome into the core."""

    def __init__(
        self,
        bus: Bus,
        records: RecordWriter,
        text: InputText,
        secret: bytes,
        core: Coordinator,
        streams: StreamBuffer,
        feed: Callable[[Event], None],
    ) -> None:
        self._bus = bus
        self._records = records
        self._text = text
        self._secret = secret
        self._core = core
        self._streams = streams
        self._feed = feed

    async def append(self, command: AppendRecord) -> None:
        try:
            await self._records.append(command.key, command.entry)
        except AmpdError as error:
            log.warning("append failed", session=command.key.session, code=error.code.value, error=error.message)
            if error.code == ErrorCode.NOT_OWNER:
                self._records.forget(command.key)
            self._feed(
                AppendFailed(key=command.key, append_id=command.append_id, code=error.code, message=error.message)
            )
        else:
            self._feed(RecordAppended(key=command.key, append_id=command.append_id))

    async def send(self, command: SendToWorker) -> None:
        message = sign_tickets(
            self._secret,
            command.worker_id,
            command.message,
            self._core.kv_bytes_per_token(command.worker_id),
        )
        event: Event
        try:
            data = await self._bus.request(
                subjects.worker_command(command.worker_id), encode(message), timeout_s=command.timeout_s
            )
            event = CommandReplied(command_id=command.command_id, reply=read_command_reply(data))
        except NoResponders:
            event = CommandFailed(command_id=command.command_id, reason="no_responders")
        except RequestTimeout:
            event = CommandFailed(command_id=command.command_id, reason="timeout")
        except BusError:
            await asyncio.sleep(min(BUS_RETRY_S, command.timeout_s))
            event = CommandFailed(command_id=command.command_id, reason="timeout")
        except AmpdError as error:  # larger than the bus takes, or an answer that cannot be read
            event = CommandReplied(command_id=command.command_id, reply=error_reply(error))
        if isinstance(event, CommandFailed) and event.reason == "no_responders":
            self._streams.flush_all()
        elif not isinstance(message, SetRole):
            self._streams.flush_session(SessionKey(message.tenant, message.session))
        self._feed(event)

    async def encode_input(self, command: EncodeInput) -> None:
        try:
            token_ids = await self._text.encode(command)
        except AmpdError as error:
            refusal = error_reply(error)
        except Exception as error:  # a text that breaks the tokeniser must not end everybody's service
            log.error("tokenising failed", session=command.key.session, exc_info=error)
            refusal = ErrorReply(code=ErrorCode.INTERNAL, message="the input could not be tokenised")
        else:
            self._feed(InputEncoded(request_id=command.request_id, key=command.key, token_ids=token_ids))
            return
        self._feed(InputRefused(request_id=command.request_id, key=command.key, error=refusal))

    async def publish(self, subject: str, data: bytes) -> None:
        """At most once, as every publish: a client that misses the end of its round reads it."""
        try:
            await self._bus.publish(subject, data)
        except AmpdError as error:
            log.warning("publish failed", subject=subject, error=error.message)
