"""KV transfers that take as long as a profile's link would need, around real ones of a few bytes.

The link of a worker is one resource: what it pulls goes through one after the other, in order of asking. The pull of
a prefill's increment starts with the prefill, so its link time overlaps the computing, as that of a transfer layer by
layer does: it is over when both are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from shared.core.step_costs import StepCosts
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.transport.client import KvClient, Pull, PullRequest, PullResult
from shared.transport.protocol import KvMemory

MAX_PULLS = 4096


class EmulatedLink:
    """T_kv: bytes over the link, plus a latency that the next transfer need not wait for. `costs` in wall seconds.

    Both ends of a cluster have the same parallel degree, so this end is as slow as the other.
    """

    def __init__(
        self,
        costs: StepCosts,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bytes_per_s = costs.link_bytes_per_s
        self._latency_s = costs.latency_s
        self._kv_bytes_per_token = costs.kv_bytes_per_token
        self._clock = clock
        self._sleep = sleep
        self._in_turn = asyncio.Lock()  # first come, first served
        self._free_at = 0.0

    def kv_bytes(self, num_tokens: int) -> int:
        """What the profile's model would move."""
        return num_tokens * self._kv_bytes_per_token

    async def carry(self, num_bytes: int) -> float:
        """Return when the bytes have passed; how long they took once it was their turn. Cancelled, the link is free."""
        asked_at = self._clock()
        transfer_s = num_bytes / self._bytes_per_s
        async with self._in_turn:
            ends_at = max(asked_at, self._free_at) + transfer_s
            try:
                await self._sleep_until(ends_at)
            except asyncio.CancelledError:
                self._free_at = self._clock()
                raise
            self._free_at = ends_at
        await self._sleep_until(ends_at + self._latency_s)
        return transfer_s + self._latency_s

    async def _sleep_until(self, at: float) -> None:
        """Deadlines, not durations: the machine's delays in waking us do not add up."""
        remaining_s = at - self._clock()
        if remaining_s > 0:
            await self._sleep(remaining_s)


class EmulatedPull(Pull):
    """A real pull and the link time of what it stands for. Its result is about the latter: bytes of the profile."""

    def __init__(self, real: Pull, client: KvClient, link: EmulatedLink) -> None:
        super().__init__(real.request, client)
        request = real.request
        self._real = real
        self._num_bytes = link.kv_bytes(request.token_stop - request.token_start)
        self._carrying = asyncio.create_task(link.carry(self._num_bytes), name="kv-link")
        # not before the real one: `done` says that no thread touches the memory any more
        self.done = asyncio.create_task(self._end(), name="kv-pull-end")
        self.done.add_done_callback(_take_notice)

    def request_stop(self) -> None:
        self._real.request_stop()
        self._carrying.cancel()

    async def _end(self) -> PullResult:
        try:
            result = await self._real.wait()
            async with asyncio.timeout(max(0.0, self.remaining_s)):
                await asyncio.wait({self._carrying})
        except TimeoutError:
            raise KvTransferError(
                ErrorCode.KV_TRANSFER_FAILED, "the pull's deadline passed before its bytes had passed the link"
            ) from None
        finally:
            self._carrying.cancel()
        if self._carrying.cancelled():
            raise KvTransferError(ErrorCode.CANCELLED, "the pull was cancelled")
        wall_s = time.monotonic() - self.started_at
        # all but the bytes' own time counts as waiting: for the producer, and for the transfers before this one
        waiting_s = max(0.0, wall_s - self._carrying.result())
        return PullResult(self._num_bytes, wall_s, waiting_s, result.num_segments, result.lane)


class EmulatedKvClient(KvClient):
    """A KvClient whose pulls also wait for the link."""

    def __init__(self, memory: KvMemory, *, worker_id: str, incarnation: int, link: EmulatedLink) -> None:
        super().__init__(memory, worker_id=worker_id, incarnation=incarnation)
        self._link = link
        self._pulls: set[EmulatedPull] = set()  # not ended

    def start_pull(self, request: PullRequest) -> EmulatedPull:
        """As KvClient.start_pull; OVERLOADED also when too many wait for the link."""
        if len(self._pulls) >= MAX_PULLS:
            raise AmpdError(ErrorCode.OVERLOADED, f"{MAX_PULLS} KV pulls wait", retry_after_s=1.0)
        pull = EmulatedPull(super().start_pull(request), self, self._link)
        self._pulls.add(pull)
        pull.done.add_done_callback(lambda _: self._pulls.discard(pull))
        return pull

    async def close(self) -> None:
        for pull in list(self._pulls):
            await pull.cancel()
        await super().close()


def _take_notice(done: asyncio.Future[PullResult]) -> None:
    """A pull that nobody waits for any more may fail without a warning."""
    if not done.cancelled():
        done.exception()
