"""A real cluster for tests: nats-server, coordinator, planner and workers as processes, on random ports."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from services.cluster_options import ClusterOptions
from services.local import LocalCluster
from shared.client import AmpdClient, ClientSession, RoundStream
from shared.engine.model_files import resolve_model
from shared.errors import AmpdError, ErrorCode
from shared.messages import Heartbeat, StopConditions

RETURNED_TIMEOUT_S = 30.0


@dataclass(eq=False)
class Cluster:
    """A started cluster, a client, and what it reported."""

    local: LocalCluster
    client: AmpdClient
    reports: list[str] = field(default_factory=list)

    async def heartbeats(self) -> dict[str, Heartbeat]:
        """The newest heartbeat of every living worker."""
        status = await self.client.status()
        return {w.heartbeat.worker_id: w.heartbeat for w in status.workers if w.alive}

    async def wait_until(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETURNED_TIMEOUT_S):
                while not await condition():  # noqa: ASYNC110 - another process changes: nothing signals it here
                    await asyncio.sleep(0.1)
                return
        pytest.fail(f"{what}, not within {RETURNED_TIMEOUT_S} s: {await self.client.status()}")

    async def assert_everything_returned(self) -> None:
        """No session, round, KV block or lease is left anywhere."""

        async def returned() -> bool:
            status = await self.client.status()
            beats = [w.heartbeat for w in status.workers if w.alive]
            return (
                status.num_sessions == 0
                and status.num_rounds_in_flight == 0
                and all(
                    (b.num_free_blocks, b.num_leases, b.num_sessions, b.num_running, b.num_waiting)
                    == (b.num_blocks, 0, 0, 0, 0)
                    and not b.queue
                    for b in beats
                )
            )

        await self.wait_until(returned, "every block, lease and session was to come back")


StartCluster = Callable[..., Awaitable[Cluster]]


@contextlib.asynccontextmanager
async def cluster_starter() -> AsyncIterator[StartCluster]:
    """`await start(**ClusterOptions fields)`, as often as wanted; what was started is stopped at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**options: object) -> Cluster:
            merged = {"model": "tiny-random", "dtype": "float32", "kv_memory_mb": 16, **options}
            reports: list[str] = []
            local = LocalCluster(ClusterOptions(**merged), reports.append)  # type: ignore[arg-type]
            stack.push_async_callback(local.stop, asyncio.Event())
            await local.start()
            supervisor = asyncio.create_task(local.supervise())
            stack.push_async_callback(_cancel, supervisor)
            client = await AmpdClient.connect(local.url)
            stack.push_async_callback(client.close)
            return Cluster(local, client, reports)

        yield start


@pytest.fixture
async def start_cluster() -> AsyncIterator[StartCluster]:
    async with cluster_starter() as start:
        yield start


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_cluster() -> AsyncIterator[Cluster]:
    """One cluster, policy `ampd`, for all tests of a module (which must run in the module's event loop)."""
    async with cluster_starter() as start:
        yield await start(policy="ampd")


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


class Reference:
    """What plain `generate` says in fp32: the truth that every served round is compared with."""

    def __init__(self, model_dir: Path) -> None:
        torch.set_num_threads(1)  # the workers need the other core
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None
        self.vocab_size: int = self._model.config.vocab_size

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        inputs = torch.tensor([prompt])
        output = self._model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
        return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(resolve_model("tiny-random"))


@dataclass(frozen=True, slots=True)
class PlannedSession:
    """Rounds of (input tokens, number of output tokens) and, for each, the tokens that must come out."""

    rounds: tuple[tuple[tuple[int, ...], int], ...]
    expected: tuple[tuple[int, ...], ...]


@pytest.fixture(scope="session")
def planned_sessions(reference: Reference) -> tuple[PlannedSession, ...]:
    """Ten sessions of three to six rounds, first inputs of up to 150 tokens, and their true outputs."""
    rng = random.Random(20260214)
    sessions = []
    for _ in range(10):
        conversation: list[int] = []
        rounds, expected = [], []
        for round_index in range(rng.randint(3, 6)):
            length = rng.randint(20, 150) if round_index == 0 else rng.randint(1, 40)
            new = tuple(rng.randrange(4, reference.vocab_size) for _ in range(length))
            num_output = rng.randint(2, 14)
            conversation += new
            output = tuple(reference.generate(conversation, num_output))
            conversation += output
            rounds.append((new, num_output))
            expected.append(output)
        sessions.append(PlannedSession(tuple(rounds), tuple(expected)))
    return tuple(sessions)


async def submit_when_there_is_room(session: ClientSession, new: tuple[int, ...], stop: StopConditions) -> RoundStream:
    """Comes back when told to: a small pool may be promised to other rounds. Bounded by the test's own timeout."""
    while True:
        try:
            return await session.submit(new, stop=stop)
        except AmpdError as error:
            if error.code is not ErrorCode.NO_CAPACITY or error.retry_after_s is None:
                raise
            await asyncio.sleep(0.1 * error.retry_after_s)


async def play(session: ClientSession, planned: PlannedSession, first: int = 0, last: int | None = None) -> list[str]:
    """Send rounds [first, last) one after the other, each compared with the truth; where each prefill ran."""
    placements = []
    for index in range(first, len(planned.rounds) if last is None else last):
        new, num_output = planned.rounds[index]
        stop = StopConditions(max_output_tokens=num_output, ignore_eos=True)
        result = await (await submit_when_there_is_room(session, new, stop)).result()
        assert tuple(result.token_ids) == planned.expected[index], f"round {index} of session {session.id}"
        placements.append(result.usage.prefill)
    return placements


@pytest.fixture
def play_session() -> Callable[..., Awaitable[list[str]]]:
    return play
