"""Re-planning on a bus: it acts, only proposes, or keeps still; it leaves alone what others have decided."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from heartbeats import make_heartbeat

from planner.planning.solve import SolverError
from planner.replanning.controller import Controller
from planner.replanning.live import LiveCluster
from planner.replanning.replanner import ReplanParameters
from shared import subjects
from shared.bus import BusMessage
from shared.errors import AmpdError, ErrorCode
from shared.memory_bus import MemoryBus, MemoryHub
from shared.messages import (
    ChangeRole,
    Heartbeat,
    ReplanMode,
    ReplanState,
    Role,
    RoleChanged,
    RoundObserved,
    Slo,
    Usage,
    decode,
    encode,
)
from shared.profile_files import SHIPPED

SLO = Slo(ttft_s=5.0, itl_s=0.05)
AT_ONCE = ReplanParameters(hold_s=0.0, settle_s=0.0)


def make_beat(worker_id: str, role: Role, seq: int = 1) -> Heartbeat:
    return msgspec.structs.replace(
        make_heartbeat(worker_id), role=role, seq=seq, profile="h100-qwen3-32b", parallel_degree=2,
        num_blocks=18_800, num_free_blocks=18_800, block_size=16,
    )  # fmt: skip


def make_round(session: int, index: int, ttft_s: float = 6.0) -> RoundObserved:
    """Long outputs, short inputs: decode is what there is too little of."""
    usage = Usage(
        num_history_tokens=1_500 * index, num_input_tokens=500, num_cached_tokens=0, num_output_tokens=1_000,
        prefill="local", prefill_worker="p", decode_worker="d",
    )  # fmt: skip
    return RoundObserved(
        tenant="t", session=f"s{session}", round=index, delay_s=2.0 if index else None, ttft_s=ttft_s, tpot_s=0.01,
        slo=SLO, usage=usage, error=None,
    )  # fmt: skip


@dataclass(eq=False)
class Cluster:
    """A coordinator's answers, two workers' heartbeats, and a clock."""

    controller: Controller
    now: list[float]
    asked: list[ChangeRole] = field(default_factory=list)
    published: asyncio.Queue[ReplanState] = field(default_factory=asyncio.Queue)
    refusal: AmpdError | None = None

    def beat(self, seq: int = 1, **roles: Role) -> None:
        for index in range(6):
            worker_id = f"prefill-{index}"
            self.controller.on_heartbeat(make_beat(worker_id, roles.get(f"prefill_{index}", "prefill"), seq))
        for index in range(2):
            self.controller.on_heartbeat(make_beat(f"both-{index}", "both", seq))

    def load(self, rounds_per_s: int, ttft_s: float = 6.0) -> None:
        for second in range(60):
            self.now[0] += 1.0
            for number in range(rounds_per_s):
                self.controller.on_round(make_round(second * rounds_per_s + number, second % 3, ttft_s))
        self.beat(seq=2)


MakeCluster = Callable[[ReplanMode], Awaitable[Cluster]]


@pytest_asyncio.fixture
async def make_cluster() -> AsyncIterator[MakeCluster]:
    hub = MemoryHub()
    buses: list[MemoryBus] = []

    async def make(mode: ReplanMode) -> Cluster:
        bus, coordinator = await hub.connect("planner"), await hub.connect("coordinator")
        buses.extend((bus, coordinator))
        now = [100.0]
        cluster = Cluster(Controller(bus, mode=mode, clock=lambda: now[0], parameters=AT_ONCE), now)

        async def on_role(message: BusMessage) -> None:
            request = decode(message.data)
            assert isinstance(request, ChangeRole)
            cluster.asked.append(request)
            if cluster.refusal is not None:
                raise cluster.refusal
            await message.respond(
                encode(RoleChanged(worker_id=request.worker_id, role=request.role, previous="prefill"))
            )

        async def on_proposal(message: BusMessage) -> None:
            state = decode(message.data)
            assert isinstance(state, ReplanState)
            cluster.published.put_nowait(state)

        await coordinator.subscribe(subjects.ROLE, on_role)
        await coordinator.subscribe(subjects.PLANNER_PROPOSAL, on_proposal)
        return cluster

    yield make
    for bus in buses:
        await bus.close()


async def test_it_has_roles_changed_that_do_not_suit_the_load(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster("act")
    cluster.beat()
    cluster.load(12)
    state = await cluster.controller.step()
    assert state.changes, state
    assert {change.role for change in state.changes} == {"both"}
    assert all(change.outcome == "done" for change in state.changes)
    assert [(r.worker_id, r.role) for r in cluster.asked] == [(c.worker_id, c.role) for c in state.changes]
    assert state.num_changed == len(state.changes)
    assert state.proposed_sessions_per_s > 1.1 * state.capacity_sessions_per_s
    assert sum(one.wanted for one in state.replicas if one.role == "both") > 2


async def test_the_roles_that_it_asked_for_are_not_taken_for_those_of_others(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster("act")
    cluster.beat()
    cluster.load(12)
    state = await cluster.controller.step()
    taken: dict[str, Role] = {change.worker_id.replace("-", "_"): "both" for change in state.changes}
    cluster.beat(seq=3, **taken)
    cluster.asked.clear()
    again = await cluster.controller.step()
    assert again.load < state.load
    assert again.num_changed == state.num_changed + len(cluster.asked)


async def test_a_dry_run_asks_nobody(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster("dry-run")
    cluster.beat()
    cluster.load(12)
    state = await cluster.controller.step()
    assert state.changes
    assert (cluster.asked, state.num_changed) == ([], 0)
    assert all(change.outcome is None for change in state.changes)


async def test_frozen_nothing_is_planned_until_it_may_again(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster("frozen")
    cluster.beat()
    cluster.load(12)
    state = await cluster.controller.step()
    assert (state.reason, state.changes, state.load) == ("frozen", (), 0.0)
    cluster.controller.set_mode("act")
    assert (await cluster.controller.step()).num_changed > 0


async def test_a_worker_whose_role_an_operator_changed_is_left_alone(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster("act")
    cluster.beat(prefill_0="both")
    cluster.load(12)  # an operator has had it prefill again
    state = await cluster.controller.step()
    assert state.changes
    assert "prefill-0" not in {change.worker_id for change in state.changes}


async def test_what_the_coordinator_refuses_is_said_and_not_counted(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster("act")
    cluster.refusal = AmpdError(ErrorCode.WORKER_LOST, "worker prefill-0 is lost")
    cluster.beat()
    cluster.load(12)
    state = await cluster.controller.step()
    assert {change.outcome for change in state.changes} == {"worker prefill-0 is lost"}
    assert state.num_changed == 0
    cluster.refusal = None
    assert (await cluster.controller.step()).num_changed > 0


async def test_little_load_changes_nothing(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster("act")
    cluster.beat()
    cluster.load(1, ttft_s=0.1)
    state = await cluster.controller.step()
    assert (state.reason, state.changes) == ("the roles suffice", ())
    assert 0.0 < state.load < 0.85


async def test_what_it_lacks_is_said(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster("act")
    assert (await cluster.controller.step()).reason == "no worker is heard"
    cluster.beat()
    assert (await cluster.controller.step()).reason == "too few rounds have ended to know the workload"
    nameless = msgspec.structs.replace(make_beat("x", "both"), profile="")
    cluster.controller.on_heartbeat(nameless)
    assert "worker x names no profile" in (await cluster.controller.step()).reason
    unknown = msgspec.structs.replace(make_beat("x", "both", seq=2), profile="h999-none")
    cluster.controller.on_heartbeat(unknown)
    cluster.load(2)
    cluster.controller.on_heartbeat(msgspec.structs.replace(unknown, seq=3))
    assert "h999-none" in (await cluster.controller.step()).reason


def test_workers_of_a_profile_that_does_not_ship_are_planned_with_by_its_file(tmp_path: Path) -> None:
    """They tell its name alone."""
    content = json.loads((SHIPPED / "h100-qwen3-32b.json").read_bytes())
    (tmp_path / "measured.json").write_text(json.dumps({**content, "name": "mine"}))
    cluster = LiveCluster(str(tmp_path / "measured.json"))
    for number in range(60):
        cluster.on_round(make_round(number, 0), float(number))
    for index, named in enumerate(("mine", "")):
        beat = msgspec.structs.replace(make_beat(f"w{index}", "both"), profile=named)
        cluster.on_heartbeat(beat, 60.0)
        described = cluster.describe(60.0)
        assert not isinstance(described, str), described
    assert len(described[1]) == 2


async def test_every_proposal_is_published(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster("dry-run")
    cluster.beat()
    cluster.load(12)
    state = await cluster.controller.step()
    assert await asyncio.wait_for(cluster.published.get(), 10.0) == state


async def test_workers_slower_than_their_profile_are_planned_with_as_they_are(make_cluster: MakeCluster) -> None:
    loads = []
    for scale in (1.0, 2.0):
        cluster = await make_cluster("dry-run")
        cluster.beat()
        cluster.load(1, ttft_s=0.1)
        for index, role in enumerate(("prefill",) * 6 + ("both",) * 2):
            name = f"{role}-{index if role == 'prefill' else index - 6}"
            beat = make_beat(name, "prefill" if role == "prefill" else "both", seq=3)
            slow = msgspec.structs.replace(beat, prefill_scale=scale, decode_scale=scale)
            cluster.controller.on_heartbeat(slow)
        loads.append((await cluster.controller.step()).load)
    assert loads[1] > 1.5 * loads[0]


async def test_a_solver_that_gives_up_costs_an_interval(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: object) -> None:
        raise SolverError("the solver stopped with Unknown")

    cluster = await make_cluster("act")
    cluster.beat()
    cluster.load(12)
    with monkeypatch.context() as broken:
        broken.setattr("planner.replanning.controller.hint_replicas", give_up)
        state = await cluster.controller.step()
    assert (state.reason, cluster.asked) == ("no plan: the solver stopped with Unknown", [])
    assert (await cluster.controller.step()).num_changed > 0
