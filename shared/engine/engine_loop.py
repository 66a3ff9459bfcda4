"""The loop that owns all KV state of a worker: plan a step, run it in one executor thread, take its tokens.

Everything but the forward pass runs on the asyncio loop, so there are no locks. While a forward pass runs, the blocks
of the sequences in it must not change hands: `remove` waits for the step to end first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

from shared.core.batching import Scheduler
from shared.core.kv_blocks import BlockAllocator
from shared.core.policies import SchedulingPolicy
from shared.core.sequences import PlannedItem, SequenceState, SessionKv
from shared.core.sequences import Sequence as RunningSequence
from shared.core.step_costs import StepCosts
from shared.core.step_prediction import StepPredictor
from shared.core.types import KvLayout, RoundKey, Segment
from shared.engine.host_tier import HostKv, HostTier
from shared.engine.step import StepItem
from shared.errors import AmpdError, ErrorCode
from shared.transport.flat_memory import FlatMemory
from shared.transport.ranges import ByteRange
from shared.transport.region import Region


class Pool(Protocol):
    layout: KvLayout
    num_blocks: int

    @property
    def region(self) -> Region | None: ...
    @property
    def flat(self) -> FlatMemory | None: ...
    def segment_views(self, block_table: Sequence[int], segment: Segment) -> list[memoryview]: ...
    def byte_ranges(self, block_table: Sequence[int], segment: Segment) -> list[ByteRange]: ...


class StepRunner(Protocol):
    """What executes a step: the torch ModelRunner, or an engine that only keeps time."""

    @property
    def layout(self) -> KvLayout: ...
    @property
    def pool(self) -> Pool: ...
    @property
    def max_context_tokens(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    def step(self, items: Sequence[StepItem]) -> list[int | None]: ...


ROOM_RETRY_S = 0.1  # who waits for room looks again after this long, whether or not something has ended

TokenHandler = Callable[[RunningSequence, int], None]


class EngineLoop:
    """Continuous batching over a StepRunner. All methods are for the asyncio loop that runs `run()`."""

    def __init__(self, runner: StepRunner, scheduler: Scheduler, *, clock: Callable[[], float]) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.clock = clock
        self._handlers: dict[RoundKey, TokenHandler] = {}
        self._in_step: set[RunningSequence] = set()
        self._step_ended = asyncio.Event()
        self._work = asyncio.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self.host_tier: HostTier | None = None
        self._restoring: dict[RunningSequence, asyncio.Task[None]] = {}
        self._failure: Exception | None = None  # of one of them
        self._room = asyncio.Event()
        self._host_read_s: Callable[[int], float] | None = None

    def follow(
        self,
        policy: SchedulingPolicy,
        costs: StepCosts | None = None,
        *,
        host_kv_bytes: int = 0,
        host_read_s: Callable[[int], float] | None = None,
    ) -> None:
        """Schedule by `policy` from now on; to be called once, before `run`.

        costs: of this worker's steps, None if they were not measured. host_kv_bytes: host memory for evicted KV, used
        if the policy has a host tier. host_read_s: what reading back n tokens of it should last, where an emulated
        engine has no such memory (seconds).
        """
        predictor = StepPredictor(costs, corrects=policy.corrects)
        self.scheduler.follow(policy.chunk, policy.order, policy.retention, predictor)
        num_blocks = host_kv_bytes // self.runner.layout.bytes_per_block
        if policy.host_tier and num_blocks > 0:
            self.host_tier = HostTier(
                self.runner.pool, num_blocks=num_blocks, retention=policy.retention, predictor=predictor
            )
            self.scheduler.memory.lower_tier = self.host_tier
            self._host_read_s = host_read_s

    def submit(self, sequence: RunningSequence, on_token: TokenHandler) -> None:
        """Take a sequence in; `on_token(sequence, token)` is called for every token sampled for it.

        The handler runs after the token has been appended to the sequence's tokens. It ends the sequence by
        calling `finish`.
        """
        self.scheduler.add(sequence)
        self._handlers[sequence.key] = on_token
        self._work.set()

    def make_ready(self, sequence: RunningSequence) -> None:
        """The KV a sequence waited for is there."""
        sequence.state = SequenceState.READY
        self._work.set()

    def finish(self, sequence: RunningSequence) -> None:
        """End a sequence from its own token handler, that is between steps."""
        assert sequence not in self._in_step
        assert sequence not in self._restoring
        if sequence.state is not SequenceState.ENDED:
            del self._handlers[sequence.key]
            self.scheduler.remove(sequence, self.clock())
        self.wake()

    async def remove(self, sequence: RunningSequence) -> None:
        """End a sequence from anywhere: returns once nothing touches its blocks."""
        while True:
            if sequence in self._in_step:
                await self._step_ended.wait()
            elif sequence in self._restoring:
                await asyncio.wait([self._restoring[sequence]])
            else:
                break
        self.finish(sequence)

    def wake(self) -> None:
        """Blocks have become free: a step that could not run may now."""
        self._work.set()
        self._room.set()

    async def reserve(self, kv: SessionKv, num_tokens: int, arrival: float) -> bool:
        """Blocks for positions [0, num_tokens), preempting if need be, at a moment when no forward pass runs."""
        while self._in_step:
            await self._step_ended.wait()
        return self.scheduler.preemption.reserve(kv, num_tokens, arrival, now=self.clock())

    def reserve_idle(self, kv: SessionKv, num_tokens: int, *, evict: bool = True, num_aside: int = 0) -> bool:
        """Blocks for positions [0, num_tokens), from what no running sequence holds, `num_aside` tokens left free; may
        be called during a step."""
        return self.scheduler.reserve(kv, num_tokens, now=self.clock(), evict=evict, num_aside=num_aside)

    async def reserve_soon(
        self, kv: SessionKv, num_tokens: int, timeout_s: float, is_wanted: Callable[[], bool]
    ) -> bool:
        """As reserve_idle, waiting up to timeout_s for the room; False also as soon as it is no longer wanted."""
        until = self.clock() + timeout_s
        while is_wanted():
            if self.reserve_idle(kv, num_tokens):
                return True
            remaining_s = until - self.clock()
            if remaining_s <= 0:
                break
            self._room.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(remaining_s, ROOM_RETRY_S)):
                    await self._room.wait()
        return False

    def count_restorable(self, kv: SessionKv) -> int:
        """Tokens in host memory that can be put behind the KV that the session has in the pool."""
        return self.host_tier.count_restorable(kv) if self.host_tier is not None else 0

    async def restore(self, kv: SessionKv, max_tokens: int) -> int:
        """Bring an idle session's KV back from host memory, as far as position `max_tokens`; how many tokens came.

        Nobody may start, stop or forget the session meanwhile. Cancelled, it returns once its blocks are left alone.
        """
        tier = self.host_tier
        entry = tier.take(kv) if tier is not None else None
        if tier is None or entry is None:
            return 0
        target = min(entry.num_tokens, max_tokens)
        if target <= kv.num_kv or not self.reserve_idle(kv, target):
            tier.put_back(kv, entry)
            return 0
        was_pinned, kv.pinned = kv.pinned, True
        reading = asyncio.ensure_future(self._read_host(tier, entry, kv, target))
        try:
            await asyncio.shield(reading)
        finally:
            if not reading.done():
                await asyncio.wait([reading])
            kv.pinned = was_pinned
            tier.release(entry)
        num_restored, kv.num_kv = target - kv.num_kv, target
        return num_restored

    async def _read_host(self, tier: HostTier, entry: HostKv, kv: SessionKv, target: int) -> None:
        num_tokens, started = target - kv.num_kv, self.clock()
        await asyncio.to_thread(tier.read, entry, tuple(kv.block_table), kv.num_kv, target)
        if self._host_read_s is not None:
            await asyncio.sleep(max(0.0, self._host_read_s(num_tokens) - (self.clock() - started)))

    async def run(self) -> None:
        """Run steps until cancelled. A failure of the forward pass is a programming error: it ends the process."""
        loop = asyncio.get_running_loop()
        began = self.clock()
        try:
            while True:
                if self._failure is not None:
                    raise self._failure
                planned = self.scheduler.plan_step(self.clock())
                for sequence in self.scheduler.take_restores():
                    self._restoring[sequence] = asyncio.create_task(self._restore_running(sequence), name="restore")
                if not planned:
                    self._work.clear()
                    await self._work.wait()
                    began = self.clock()
                    continue
                items = [self._step_item(item) for item in planned]
                self._in_step = {item.sequence for item in planned}
                self._step_ended = asyncio.Event()
                for item in planned:
                    on_start, item.sequence.on_start = item.sequence.on_start, None
                    if on_start is not None:
                        on_start()
                tokens = await loop.run_in_executor(self._executor, self.runner.step, items)
                self._in_step = set()
                # what is done between two steps is of the second: as much later come its tokens
                ended = self.clock()
                self._take(planned, tokens, ended - began)
                began = ended
                self._step_ended.set()
                # those who waited for the step's end go first; and a busy engine must not starve the bus
                await asyncio.sleep(0)
        finally:
            self._executor.shutdown(wait=True, cancel_futures=True)
            await asyncio.gather(*self._restoring.values(), return_exceptions=True)

    async def _restore_running(self, sequence: RunningSequence) -> None:
        """A preempted or waiting sequence's KV comes back into the blocks that it was given for it."""
        try:
            await self.restore(sequence.kv, sequence.kv.num_tokens - 1)
        except Exception as error:  # `run` raises it
            self._failure = error
        finally:
            del self._restoring[sequence]
            sequence.state = SequenceState.READY
            self._work.set()

    def _step_item(self, item: PlannedItem) -> StepItem:
        kv, sequence = item.sequence.kv, item.sequence
        first = kv.num_kv - kv.tokens_base
        on_layer = sequence.on_layer
        return StepItem(
            token_ids=kv.tokens[first : first + item.num_tokens],
            start_position=kv.num_kv,
            block_table=tuple(kv.block_table),
            sampling=sequence.sampling if item.samples else None,
            output_index=kv.num_tokens - sequence.output_start,
            on_layer=None
            if on_layer is None
            else partial(_report_layer, on_layer, kv.num_kv, kv.num_kv + item.num_tokens),
        )

    def _take(self, planned: Sequence[PlannedItem], tokens: Sequence[int | None], seconds: float) -> None:
        self._observe(planned, seconds)
        for item, token in zip(planned, tokens, strict=True):
            kv = item.sequence.kv
            kv.num_kv += item.num_tokens
            if token is not None:
                kv.tokens.append(token)
        # handlers after all state is updated: they may submit, finish or read any sequence
        for item, token in zip(planned, tokens, strict=True):
            handler = self._handlers.get(item.sequence.key)
            if token is not None and handler is not None:
                handler(item.sequence, token)

    def _observe(self, planned: Sequence[PlannedItem], seconds: float) -> None:
        """Exponentially weighted rates, for routing: of steps that only prefill, and of steps that only decode."""
        predictor = self.scheduler.predictor
        chunks = [(item.sequence.kv.num_kv, item.num_tokens) for item in planned if item.num_tokens > 1]
        contexts = [item.sequence.kv.num_kv + 1 for item in planned if item.num_tokens == 1]
        num_prefill = sum(num_tokens for _, num_tokens in chunks)
        if num_prefill == 0:
            self.decode_step_s = _blend(self.decode_step_s, seconds)
        elif not contexts and seconds > 0:
            self.prefill_tokens_per_s = _blend(self.prefill_tokens_per_s, num_prefill / seconds)
            predictor.tokens_per_s = self.prefill_tokens_per_s
        predictor.observe(len(contexts), sum(contexts) / len(contexts) if contexts else 0.0, chunks, seconds)


def build_scheduler(runner: StepRunner, *, chunk_tokens: int, max_prefill_tokens: int, max_batch: int) -> Scheduler:
    allocator = BlockAllocator(runner.pool.num_blocks, runner.layout.block_size)
    if chunk_tokens < 1 or max_prefill_tokens < 1 or max_batch < 1:
        raise AmpdError(ErrorCode.INVALID_REQUEST, "--chunk-tokens, --max-prefill-tokens and --max-batch must be >= 1")
    return Scheduler(allocator, chunk_tokens=chunk_tokens, max_prefill_tokens=max_prefill_tokens, max_batch=max_batch)


def _report_layer(on_layer: Callable[[int, int, int], object], start: int, stop: int, layer: int) -> None:
    on_layer(layer, start, stop)


def _blend(old: float, new: float, weight: float = 0.2) -> float:
    return new if old == 0.0 else (1 - weight) * old + weight * new
