"""The emulated engine: steps and transfers last what the profile says, tokens are a function of what was fed."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest

from shared.core.measured_costs import build_profile_costs
from shared.core.profile import Curve, DegreeProfile, Grid, Links, Profile
from shared.core.step_costs import StepCosts
from shared.core.types import RoundKey
from shared.engine.emulated import EOS_TOKEN_ID, FIRST_ORDINARY_ID, EmulatedRunner
from shared.engine.emulated_transfer import EmulatedKvClient, EmulatedLink, EmulatedPull
from shared.engine.step import StepItem
from shared.errors import AmpdError, ErrorCode, KvTransferError
from shared.id_only_codec import IdOnlyCodec
from shared.messages import SamplingParams
from shared.transport.client import PullRequest
from shared.transport.leases import LeaseEnd, LeaseTable
from shared.transport.server import KvServer
from shared.transport.tickets import TicketClaims, mint

GREEDY = SamplingParams()
SECRET = b"the secret of these tests"


def make_profile(**changes: object) -> Profile:
    def degree(n: int) -> DegreeProfile:
        return DegreeProfile(
            parallel_degree=n,
            num_kv_tokens=100_000 * n,
            linear=Curve(at=(1, 256, 8192), s=(0.010 / n, 0.012 / n, 0.400 / n)),
            prefill_attention=Grid(rows=(0, 32_768), columns=(1, 8192), s=((0.0, 0.040 / n), (0.001 / n, 0.200 / n))),
            decode_attention=Grid(rows=(1, 256), columns=(0, 32_768), s=((0.0, 0.001 / n), (0.0005, 0.100 / n))),
        )

    profile = Profile(
        name="test",
        model="test",
        device="test",
        provenance={"made": "up"},
        max_context_tokens=40_960,
        vocab_size=1_000,
        kv_bytes_per_token=262_144,
        host_kv_bytes=0,
        links=Links(
            devices_per_node=8,
            intra_node_bytes_per_s=4e11,
            inter_node_bytes_per_s=5e10,
            host_bytes_per_s=5e10,
            latency_s=0.0001,
        ),
        degrees=(degree(1), degree(2)),
    )
    return msgspec.structs.replace(profile, **changes)


class ManualTime:
    """A clock that only sleeping moves; `late_s` is by how much the machine oversleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.late_s = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + self.late_s


def make_runner(time: ManualTime, *, parallel_degree: int = 1, time_scale: float = 1.0) -> EmulatedRunner:
    return EmulatedRunner(
        make_profile(), parallel_degree=parallel_degree, time_scale=time_scale, clock=time, sleep=time.sleep
    )


def decode(position: int, token: int = 7, output_index: int = 1) -> StepItem:
    return StepItem([token], position, (1,), GREEDY, output_index)


def chunk(num_tokens: int, start: int = 0, sampling: SamplingParams | None = None) -> StepItem:
    return StepItem(list(range(10, 10 + num_tokens)), start, (1,), sampling)


def duration_s(runner: EmulatedRunner, time: ManualTime, items: Sequence[StepItem]) -> float:
    time.now += 1e6  # long after the last step
    started = time.now
    runner.step(items)
    return time.now - started


# ------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize(("parallel_degree", "time_scale"), [(1, 1.0), (2, 1.0), (2, 10.0)])
def test_a_step_lasts_what_the_profile_says(parallel_degree: int, time_scale: float) -> None:
    time = ManualTime()
    runner = make_runner(time, parallel_degree=parallel_degree, time_scale=time_scale)
    costs = StepCosts.from_profile(make_profile(), parallel_degree)
    for items, expected_s in (
        ([decode(999), decode(2999)], costs.step_s(2, 2000.0, [])),
        ([chunk(512, 4096)], costs.step_s(0, 0.0, [(4096, 512)])),
        ([decode(99), chunk(300, 50), chunk(20)], costs.step_s(1, 100.0, [(50, 300), (0, 20)])),
    ):
        assert duration_s(runner, time, items) == pytest.approx(time_scale * expected_s, rel=1e-6)


def test_one_token_costs_the_same_at_the_tail_of_a_prefill_and_in_a_decode() -> None:
    time = ManualTime()
    runner = make_runner(time)
    tail = StepItem([7], 4095, (1,), None)
    expected = runner.costs.decode_step_s(1, 4096.0)
    for item in (tail, decode(4095), decode(4095, output_index=0)):
        assert duration_s(runner, time, [item]) == pytest.approx(expected, rel=1e-6)


def test_time_between_steps_does_not_add_up_and_idle_time_is_not_taken_back() -> None:
    time = ManualTime()
    runner = make_runner(time, time_scale=10.0)
    step_s = 10 * runner.costs.decode_step_s(1, 1000.0)
    started = time.now
    for _ in range(50):
        runner.step([decode(999)])
        time.now += 0.05 * step_s  # what the process does between two steps
    assert time.now - started == pytest.approx(50.05 * step_s)
    time.now += 0.2 * step_s  # nothing to do
    started = time.now
    runner.step([decode(999)])
    assert time.now - started == pytest.approx(step_s)


def test_a_long_step_takes_back_no_more_idle_time_than_a_short_one() -> None:
    time = ManualTime()
    runner = make_runner(time, time_scale=10.0)
    runner.step([chunk(4096)])
    time.now += 0.02  # a tenth of the next step is far more
    started = time.now
    runner.step([chunk(4096)])
    assert time.now - started == pytest.approx(10 * runner.costs.prefill_s(0, 4096))
    assert 10 * runner.costs.prefill_s(0, 4096) > 0.4


def test_a_machine_that_wakes_late_is_noticed() -> None:
    time = ManualTime()
    runner = make_runner(time)
    runner.step([decode(999)])
    assert runner.late_s == pytest.approx(0.0, abs=1e-9)
    time.late_s = 0.25
    runner.step([decode(999)])
    assert runner.late_s == pytest.approx(0.25)
    assert runner.busy_s == pytest.approx(2 * runner.costs.decode_step_s(1, 1000.0))


def test_the_kv_of_a_layer_is_there_when_the_steps_time_is_over() -> None:
    time = ManualTime()
    runner = make_runner(time)
    seen: list[tuple[int, float]] = []
    item = StepItem(range(100), 0, (1,), None, on_layer=lambda layer: seen.append((layer, time.now)))
    started = time.now
    assert runner.step([item]) == [None]
    assert seen == [(0, pytest.approx(started + runner.costs.prefill_s(0, 100)))]
    assert runner.pool.layout.num_layers == runner.layout.num_layers == 1


# ----------------------------------------------------------------------------------------- tokens


def test_tokens_are_ordinary_ones_and_differ() -> None:
    runner = make_runner(ManualTime())
    tokens = runner.step([decode(position, token, index) for index, (position, token) in
                          enumerate((p, t) for p in range(40) for t in range(50))])  # fmt: skip
    assert all(FIRST_ORDINARY_ID <= token < runner.vocab_size for token in tokens if token is not None)
    assert None not in tokens
    assert EOS_TOKEN_ID not in tokens
    assert runner.eos_token_ids == {EOS_TOKEN_ID}
    assert len(set(tokens)) > 700  # 2,000 draws of 997


def test_a_token_does_not_depend_on_chunks_caches_or_the_batch() -> None:
    runner = make_runner(ManualTime())
    whole = runner.step([chunk(100, sampling=GREEDY)])[0]
    tail = StepItem([109], 99, (1,), GREEDY)
    assert runner.step([decode(5), tail]) == [runner.step([decode(5)])[0], whole]
    assert runner.step([StepItem([109], 99, (1,), GREEDY, output_index=1)]) != [whole]
    assert runner.step([StepItem([108], 99, (1,), GREEDY)]) != [whole]


# --------------------------------------------------------------------------------- what it says it is


def test_the_pool_is_as_large_as_the_devices_memory_and_a_few_bytes_in_truth() -> None:
    runner = make_runner(ManualTime(), parallel_degree=2)
    assert runner.pool.num_blocks == 200_000 // 16 + 1
    assert runner.layout.bytes_per_token == 262_144  # what heartbeats and tickets count with
    assert runner.pool.layout.bytes_per_token == 4
    assert runner.layout.block_size == runner.pool.layout.block_size == 16


def test_workers_exchange_kv_across_degrees_but_not_across_time_scales() -> None:
    time = ManualTime()
    one = make_runner(time)
    for other, equal in (
        (make_runner(time, parallel_degree=2), True),
        (make_runner(time, time_scale=2.0), False),
    ):
        assert (one.layout.layout_hash == other.layout.layout_hash) is equal
        assert (one.pool.layout.layout_hash == other.pool.layout.layout_hash) is equal


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({}, {"time_scale": 0.0}, "--time-scale"),
        ({}, {"time_scale": float("nan")}, "--time-scale"),
        ({}, {"parallel_degree": 3}, "choose one of 1, 2"),
        ({}, {"block_size": 0}, "--block-size"),
        ({"vocab_size": 3}, {}, "vocab_size"),
        ({"kv_bytes_per_token": 1026}, {}, "multiple of 4"),
    ],
)
def test_what_cannot_be_emulated_is_refused(
    changes: dict[str, object], arguments: dict[str, object], says: str
) -> None:
    with pytest.raises(AmpdError, match=says) as caught:
        EmulatedRunner(make_profile(**changes), **arguments)  # type: ignore[arg-type]
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_whatever_needs_text_is_refused() -> None:
    codec = IdOnlyCodec(vocab_size=1000, eos_token_ids=frozenset({2}))
    decoder = codec.stream_decoder()
    assert (decoder.push(5), decoder.finish(), decoder.stopped) == ("", "", False)
    for ask in (
        lambda: codec.stream_decoder(["stop"]),
        lambda: codec.encode_text("text"),
        lambda: codec.encode_chat([("user", "text")], first_round=True, previous_ended_with_eos=False),
    ):
        with pytest.raises(AmpdError) as caught:
            ask()
        assert caught.value.code is ErrorCode.TEXT_UNAVAILABLE


def test_a_worker_with_the_emulated_engine_never_imports_torch(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(make_profile()))
    code = (
        "import sys\n"
        "from services.worker.app import build_parser\n"
        "from services.worker.engines import load_engine\n"
        "from services.worker.kv_lanes import build_lanes\n"
        "engine = load_engine(build_parser('decode').parse_args(['--engine=emulated', '--profile=p.json']))\n"
        "engine.make_kv_client('w', 1, build_lanes('auto', engine.runner.pool, 'w'))\n"
        "sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------- transfers


class Gate:
    """A sleep of the link that ends when the test says so; by then its time has passed on `time`."""

    def __init__(self, time: ManualTime) -> None:
        self._time = time
        self.asleep: asyncio.Queue[tuple[float, asyncio.Event]] = asyncio.Queue()

    async def __call__(self, seconds: float) -> None:
        until, wake = self._time.now + seconds, asyncio.Event()
        self.asleep.put_nowait((seconds, wake))
        await wake.wait()
        self._time.now = max(self._time.now, until)

    async def pass_one(self) -> float:
        """End the sleep that began first; how long it was to last."""
        seconds, wake = await asyncio.wait_for(self.asleep.get(), 10)
        wake.set()
        return seconds


def make_link(time: ManualTime, gate: Gate, *, time_scale: float = 1.0, **changes: object) -> EmulatedLink:
    costs = build_profile_costs(make_profile(**changes), 1, time_scale)
    assert costs is not None
    return EmulatedLink(costs, clock=time, sleep=gate)


NO_LATENCY = Links(
    devices_per_node=8,
    intra_node_bytes_per_s=4e11,
    inter_node_bytes_per_s=5e10,
    host_bytes_per_s=5e10,
    latency_s=0.0,
)


async def test_transfers_of_one_worker_queue_behind_each_other() -> None:
    time = ManualTime()
    gate = Gate(time)
    link = make_link(time, gate, time_scale=10.0, links=NO_LATENCY)
    first = asyncio.create_task(link.carry(5 * 10**10))
    second = asyncio.create_task(link.carry(10**10))
    assert await gate.pass_one() == pytest.approx(10.0)
    assert await first == pytest.approx(10.0)
    assert not second.done()
    assert await gate.pass_one() == pytest.approx(2.0)
    assert await second == pytest.approx(2.0), "its own time, not that of the queue"
    assert time.now == pytest.approx(112.0)


async def test_a_latency_does_not_hold_the_link() -> None:
    time = ManualTime()
    gate = Gate(time)
    link = make_link(time, gate)
    first = asyncio.create_task(link.carry(5 * 10**10))
    second = asyncio.create_task(link.carry(10**10))
    assert await gate.pass_one() == pytest.approx(1.0)
    sleeps = sorted([await gate.pass_one(), await gate.pass_one()])
    assert sleeps == [pytest.approx(0.0001), pytest.approx(0.2)]
    assert await first == pytest.approx(1.0001)
    assert await gate.pass_one() == pytest.approx(0.0001)
    await second


async def test_a_cancelled_transfer_frees_the_link() -> None:
    time = ManualTime()
    gate = Gate(time)
    link = make_link(time, gate, links=NO_LATENCY)
    first = asyncio.create_task(link.carry(5 * 10**10))
    waiting = asyncio.create_task(link.carry(5 * 10**10))
    last = asyncio.create_task(link.carry(10**10))
    assert (await gate.asleep.get())[0] == pytest.approx(1.0)
    time.now += 0.25
    waiting.cancel()
    first.cancel()
    await asyncio.wait({first, waiting})
    assert await gate.pass_one() == pytest.approx(0.2)
    await last
    assert time.now == pytest.approx(100.45)


class PullPair:
    """A source's server and a client that pulls from it over a real socket, its link held by `gate`."""

    def __init__(self, folder: Path) -> None:
        self.time = ManualTime()
        self.gate = Gate(self.time)
        self.source, target = make_runner(self.time), make_runner(self.time)
        self.source.pool.blocks.fill(9)
        self.target = target
        self.leases = LeaseTable(self.time)
        self.server = KvServer(
            self.source.pool,
            self.leases,
            worker_id="source",
            incarnation=1,
            secret=SECRET,
            listen=[f"unix://{folder}/kv.sock"],
        )
        self.endpoints = self.server.start()
        link = make_link(self.time, self.gate, links=NO_LATENCY)
        self.client = EmulatedKvClient(target.pool, worker_id="target", incarnation=2, link=link)
        self.delivered = asyncio.Event()

    def start_pull(self, num_tokens: int, *, deadline_s: float = 60.0, complete: bool = True) -> EmulatedPull:
        loop, key, blocks = asyncio.get_running_loop(), RoundKey("t", "s", 0, 1), tuple(range(1, 60))

        def on_end(_: object, end: LeaseEnd) -> None:
            if end is LeaseEnd.DELIVERED:
                loop.call_soon_threadsafe(self.delivered.set)

        lease = self.leases.grant(
            key, blocks, 0, num_tokens, ttl_s=60.0, on_end=on_end, complete=complete, num_layers=1
        )
        claims = TicketClaims(
            key=key,
            source="source",
            source_incarnation=1,
            destination="target",
            destination_incarnation=2,
            max_bytes=num_tokens * self.source.layout.bytes_per_token,
            ttl_s=60.0,
            nonce=secrets.token_bytes(16),
        )
        return self.client.start_pull(
            PullRequest(
                key=key,
                endpoints=self.endpoints,
                ticket=mint(SECRET, claims),
                source="source",
                source_incarnation=1,
                lease_id=lease.lease_id,
                generation=lease.generation,
                block_table=blocks,
                token_start=0,
                token_stop=num_tokens,
                deadline_s=deadline_s,
            )
        )


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[PullPair]:
    pair = PullPair(tmp_path)
    yield pair
    await pair.client.close()
    await asyncio.to_thread(pair.server.close)


async def test_a_pull_ends_when_its_bytes_are_here_and_the_links_time_is_over(pair: PullPair) -> None:
    pull = pair.start_pull(800)
    await asyncio.wait_for(pair.delivered.wait(), 30)
    assert (pair.target.pool.blocks[1:51] == 9).all(), "the real bytes are here"
    assert not pull.done.done()
    assert await pair.gate.pass_one() == pytest.approx(800 * 262_144 / 5e10)
    result = await asyncio.wait_for(pull.wait(), 30)
    assert result.num_bytes == 800 * 262_144
    assert result.wall_s - result.waiting_s == pytest.approx(min(result.wall_s, 800 * 262_144 / 5e10))
    await pull.cancel()  # once it has ended: nothing


async def test_a_cancelled_pull_ends_at_once_and_the_next_has_the_link(pair: PullPair) -> None:
    first, second = pair.start_pull(800), pair.start_pull(160)
    _, first_wakes = await pair.gate.asleep.get()
    await asyncio.wait_for(pair.delivered.wait(), 30)
    await asyncio.wait_for(first.cancel(), 30)
    with pytest.raises(KvTransferError) as caught:
        await first.wait()
    assert caught.value.code is ErrorCode.CANCELLED
    assert not first_wakes.is_set()
    assert await pair.gate.pass_one() == pytest.approx(160 * 262_144 / 5e10)
    assert (await asyncio.wait_for(second.wait(), 30)).num_bytes == 160 * 262_144


async def test_a_pull_whose_producer_is_not_done_can_be_cancelled_and_frees_the_link(pair: PullPair) -> None:
    pull = pair.start_pull(800, complete=False)
    await pair.gate.asleep.get()
    await asyncio.wait_for(pull.cancel(), 30)
    with pytest.raises(KvTransferError) as caught:
        await pull.wait()
    assert caught.value.code is ErrorCode.CANCELLED
    second = pair.start_pull(160)
    await pair.gate.pass_one()
    await asyncio.wait_for(second.wait(), 30)


async def test_a_pull_that_the_link_keeps_past_its_deadline_fails(pair: PullPair) -> None:
    pull = pair.start_pull(800, deadline_s=0.2)
    with pytest.raises(KvTransferError) as caught:
        await asyncio.wait_for(pull.wait(), 30)
    assert caught.value.code is ErrorCode.KV_TRANSFER_FAILED


async def test_closing_the_client_ends_pulls_that_wait_for_the_link(pair: PullPair) -> None:
    pulls = [pair.start_pull(800), pair.start_pull(800)]
    await pair.gate.asleep.get()
    await asyncio.wait_for(pair.client.close(), 30)
    for pull in pulls:
        with pytest.raises(KvTransferError):
            await pull.wait()
