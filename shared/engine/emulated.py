"""An engine that only keeps time: steps last what a profile says, tokens come out of a hash, KV is a few bytes a token.

Everything around it is real: the scheduler, the KV blocks, leases, tickets and sockets. So one machine runs a cluster
of many workers through the live services. No torch here, so that such a worker starts fast and stays small.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from shared.core.profile import Profile
from shared.core.step_costs import StepCosts
from shared.core.types import KvLayout
from shared.engine.step import StepItem
from shared.errors import AmpdError, ErrorCode
from shared.transport.memory import HostKvMemory

EOS_TOKEN_ID = 2
FIRST_ORDINARY_ID = 3  # the ids before it are special ones, as in most vocabularies: none of them is ever produced
CATCH_UP_SHARE, CATCH_UP_S = 0.1, 0.01  # of a step's duration, and of the wall clock: see EmulatedRunner.step
_DTYPE = "float16"
_NUM_LAYERS = 1
_MASK = (1 << 64) - 1


class EmulatedPool(HostKvMemory):
    """As many blocks as the profile's device memory holds, four bytes a token."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        super().__init__(layout, num_blocks)
        self.num_blocks = num_blocks


class EmulatedRunner:
    """A StepRunner whose steps last time_scale * T_step of the profile, in wall seconds.

    `layout` is what the worker says of itself: the profile's KV bytes a token. `pool.layout` is what its sockets
    really move. Workers of equal profile, time scale and block size can exchange KV.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        parallel_degree: int = 1,
        time_scale: float = 1.0,
        block_size: int = 16,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """time_scale: wall seconds per second of the profile. Raises AmpdError INVALID_REQUEST."""
        check_time_scale(time_scale)
        if block_size < 1:
            raise AmpdError(ErrorCode.INVALID_REQUEST, f"--block-size must be at least 1, not {block_size}")
        if profile.vocab_size <= FIRST_ORDINARY_ID:
            raise _unfit(profile, f"vocab_size is {profile.vocab_size}: more than {FIRST_ORDINARY_ID} are needed")
        slot_bytes, rest = divmod(profile.kv_bytes_per_token, 2 * _NUM_LAYERS)
        if rest or slot_bytes % 2:
            raise _unfit(profile, f"kv_bytes_per_token is {profile.kv_bytes_per_token}: not a multiple of 4")
        self.costs = StepCosts.from_profile(profile, parallel_degree)
        self.time_scale = time_scale
        self.vocab_size = profile.vocab_size
        self.max_context_tokens = profile.max_context_tokens
        self.eos_token_ids = frozenset({EOS_TOKEN_ID})
        model = f"emulated {profile.name} x{time_scale:g}"
        self.layout = _layout(model, slot_bytes // 2, block_size)
        num_blocks = self.costs.num_kv_tokens // block_size + 1  # block 0 is padding
        self.pool = EmulatedPool(_layout(model, 1, block_size), num_blocks)
        self.busy_s = 0.0  # of all steps, as they should last
        self.late_s = 0.0  # by how much steps ended after their time, in all
        self._clock = clock
        self._sleep = sleep
        self._ended_at = -math.inf  # when the last step's time was over, whenever it really returned

    def step(self, items: Sequence[StepItem]) -> list[int | None]:
        """The next token of every item that samples. Returns when the step's time is over, in a thread that may wait.

        A step that begins right after the last one ended (within a tenth of its own duration, 10 ms at most) counts
        from that end: what this process needs between steps, and how late the machine woke it, would otherwise add to
        every step. A worker that had nothing to do for longer gets none of that time back.
        """
        now = self._clock()
        duration_s = self.time_scale * step_s(self.costs, items)
        is_next = now - self._ended_at <= min(CATCH_UP_SHARE * duration_s, CATCH_UP_S)
        started = self._ended_at if is_next else now
        self._ended_at = started + duration_s
        tokens = [
            None if item.sampling is None else choose_token(item, self.vocab_size)  # within the step's time
            for item in items
        ]
        remaining_s = self._ended_at - self._clock()
        if remaining_s > 0:
            self._sleep(remaining_s)
        self.busy_s += duration_s
        self.late_s += max(0.0, self._clock() - self._ended_at)
        for item in items:
            if item.on_layer is not None:
                for layer in range(_NUM_LAYERS):
                    item.on_layer(layer)
        return tokens


def step_s(costs: StepCosts, items: Sequence[StepItem]) -> float:
    """T_step of the profile, unscaled.

    An item of one token is a decode, whether it samples or not: one query over its context is the same work in a
    decoding round and at the tail of a prefill. Longer items are prefill chunks.
    """
    batch = num_context_tokens = 0
    chunks: list[tuple[int, int]] = []
    for item in items:
        num_tokens = len(item.token_ids)
        if num_tokens == 1:
            batch += 1
            num_context_tokens += item.start_position + 1
        else:
            chunks.append((item.start_position, num_tokens))
    return costs.step_s(batch, num_context_tokens / batch if batch else 0.0, chunks)


def choose_token(item: StepItem, vocab_size: int) -> int:
    """A token of [FIRST_ORDINARY_ID, vocab_size), from the last token fed, its position and the output's index.

    These do not depend on how a prompt was cut into chunks, nor on what was cached: a round that is placed again,
    elsewhere, goes on with the same tokens.
    """
    position = item.start_position + len(item.token_ids) - 1
    value = (position << 40) ^ (item.output_index << 20) ^ item.token_ids[-1]
    # the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): every bit of the input reaches every bit
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    value ^= value >> 31
    return FIRST_ORDINARY_ID + value % (vocab_size - FIRST_ORDINARY_ID)


def check_time_scale(time_scale: float) -> None:
    if not 0.0 < time_scale < math.inf:
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"--time-scale must be a number above 0, not {time_scale:g}")


def _layout(model: str, head_dim: int, block_size: int) -> KvLayout:
    return KvLayout(
        model=model,
        num_layers=_NUM_LAYERS,
        num_kv_heads=1,
        head_dim=head_dim,
        block_size=block_size,
        dtype=_DTYPE,
    )


def _unfit(profile: Profile, problem: str) -> AmpdError:
    return AmpdError(ErrorCode.INVALID_REQUEST, f"profile {profile.name} cannot be emulated: {problem}")
