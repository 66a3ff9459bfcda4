"""`ampd chat`: a multi-round conversation in the terminal; each line is one round of one session."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from services.connect import connect_to_cluster
from shared.client import ClientSession, RoundResult
from shared.errors import AmpdError
from shared.messages import ChatMessage, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """`session` None: a new session, closed at the end; a named one stays open and can be come back to."""

    url: str
    session: str | None = None
    tenant: str = "default"
    system: str | None = None
    max_output_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)


def chat(options: ChatOptions, console: Console) -> int:
    """Returns 0, or 1 when a round failed. Raises AmpdError when the cluster cannot be reached."""
    # The line editor wants the main thread; the bus must go on answering pings while it waits for a line.
    with event_loop_thread() as run:
        client = run(connect_to_cluster(options.url, name="ampd-chat", tenant=options.tenant)).result()
        try:
            session = run(client.open_session(options.session)).result()
            interactive = sys.stdin.isatty()
            if interactive:
                import readline  # noqa: F401 - gives input() line editing and a history

                console.print(Text(f"{session.opened.model}, session {session.id} (Ctrl-D ends)", style="dim"))
            num_failed = _converse(session, options, interactive, run, console)
            if options.session is None:
                run(session.close()).result()
        finally:
            run(client.close()).result()
    return 1 if num_failed else 0


def _converse(session: ClientSession, options: ChatOptions, interactive: bool, run: Runner, console: Console) -> int:
    """Rounds until the input ends; returns how many failed."""
    new_messages = [ChatMessage(role="system", content=options.system)] if options.system else []
    num_failed = 0
    while (line := _read_line(interactive)) is not None:
        if not line.strip():
            continue
        new_messages.append(ChatMessage(role="user", content=line))
        running = run(_play_round(session, new_messages, options))
        try:
            result = _wait_or_cancel(running, session, run)
        except AmpdError as error:
            num_failed += 1
            console.print(Text(f"\n{error.message}", style="red"), soft_wrap=True)
        else:
            console.print(Text(describe_round(result), style="dim"), soft_wrap=True)
            new_messages = []
    return num_failed


def _read_line(interactive: bool) -> str | None:
    """The next line; None at the end of the input or at Ctrl-C."""
    try:
        return input("> " if interactive else "")
    except (EOFError, KeyboardInterrupt):
        return None


async def _play_round(session: ClientSession, new_messages: list[ChatMessage], options: ChatOptions) -> RoundResult:
    """Send one round and write its text as it comes."""
    stream = await session.submit(new_messages, max_output_tokens=options.max_output_tokens, sampling=options.sampling)
    async for chunk in stream:
        sys.stdout.write(printable(chunk.text))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return await stream.result()


def _wait_or_cancel(running: Future[RoundResult], session: ClientSession, run: Runner) -> RoundResult:
    """Ctrl-C cancels the round, not the conversation: it then ends with the error CANCELLED."""
    try:
        return running.result()
    except KeyboardInterrupt:
        run(session.cancel()).result()
        return running.result()


def printable(text: str) -> str:
    """A model's output without what would command the terminal: control characters other than line feed and tab."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def describe_round(result: RoundResult) -> str:
    """One line: where the prefill ran, what was cached, how fast the tokens came to this terminal."""
    usage = result.usage
    place = usage.prefill_worker if usage.prefill == "remote" else f"{usage.decode_worker} (local)"
    num_new = usage.num_history_tokens + usage.num_input_tokens - usage.num_cached_tokens
    parts = [f"prefill on {place}: {num_new} new, {usage.num_cached_tokens} cached"]
    if result.first_token_s is not None:
        parts.append(f"TTFT {(result.first_token_s - result.sent_s) * 1e3:.0f} ms")
    parts.append(f"{usage.num_output_tokens} tokens")
    if len(result.token_times) > 1:
        itl_s = (result.token_times[-1] - result.token_times[0]) / (len(result.token_times) - 1)
        parts.append(f"{1 / itl_s:.1f} tokens/s" if itl_s > 0 else "all at once")
    if usage.kv_bytes_moved:
        parts.append(f"{usage.kv_bytes_moved / 2**20:.1f} MiB of KV moved")
    return f"[{'; '.join(parts)}]"


class Runner:
    """Runs coroutines on the loop of another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __call__(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


@contextmanager
def event_loop_thread() -> Iterator[Runner]:
    """An event loop in a thread of its own, stopped and joined at the end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="ampd-chat-bus", daemon=True)
    thread.start()
    try:
        yield Runner(loop)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        with contextlib.closing(loop):
            loop.run_until_complete(loop.shutdown_asyncgens())
