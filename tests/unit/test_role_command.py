"""`ampd role`: what it asks, what it shows, how a refusal ends; and what `ampd status` shows meanwhile."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from typing import get_args

import pytest
from heartbeats import make_heartbeat
from rich.console import Console, Group

import services.role
from services.cli import ROLES, build_parser
from services.role import change_role
from services.status import describe_status, status_for_programs
from shared import subjects
from shared.bus import BusMessage
from shared.client import AmpdClient
from shared.errors import AmpdError, ErrorCode
from shared.memory_bus import MemoryHub
from shared.messages import ChangeRole, ClusterStatus, ErrorReply, Role, RoleChanged, WorkerStatus, decode, encode


@pytest.fixture
async def roles(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, Role]]:
    """A coordinator, reached by whatever URL, and the roles of its workers."""
    hub, roles = MemoryHub(), dict[str, Role]({"decode-0": "decode"})
    coordinator = await hub.connect("coordinator")

    async def answer(message: BusMessage) -> None:
        request = decode(message.data)
        assert isinstance(request, ChangeRole)
        if request.worker_id not in roles:
            await message.respond(encode(ErrorReply(code=ErrorCode.INVALID_REQUEST, message="no such worker")))
            return
        previous, roles[request.worker_id] = roles[request.worker_id], request.role
        await message.respond(encode(RoleChanged(worker_id=request.worker_id, role=request.role, previous=previous)))

    await coordinator.subscribe(subjects.ROLE, answer)

    async def connect(url: str, *, name: str) -> AmpdClient:
        return AmpdClient(await hub.connect(name), owns_bus=True)

    monkeypatch.setattr(services.role, "connect_to_cluster", connect)
    yield roles
    await coordinator.close()


async def ask(worker_id: str, role: Role, *, as_json: bool = False) -> str:
    console = Console(file=io.StringIO(), width=80)
    assert await change_role("nats://x", worker_id=worker_id, role=role, as_json=as_json, console=console) == 0
    shown: str = console.file.getvalue()  # type: ignore[attr-defined]
    return shown


async def test_the_outcome_is_shown_for_people_and_for_programs(roles: dict[str, Role]) -> None:
    assert await ask("decode-0", "prefill") == "decode-0: decode -> prefill\n"
    assert roles == {"decode-0": "prefill"}
    assert await ask("decode-0", "prefill") == "decode-0 has the role prefill already\n"
    shown = json.loads(await ask("decode-0", "both", as_json=True))
    assert shown == {"type": "role_changed", "worker_id": "decode-0", "role": "both", "previous": "prefill"}


@pytest.mark.usefixtures("roles")
async def test_a_refusal_is_raised() -> None:
    with pytest.raises(AmpdError) as refused:
        await ask("decode-9", "prefill")
    assert refused.value.code == ErrorCode.INVALID_REQUEST


def test_the_subcommand_takes_a_worker_a_role_and_json() -> None:
    parsed = build_parser().parse_args(["role", "decode-0", "both", "--json", "--nats-url", "nats://y"])
    assert (parsed.worker_id, parsed.role, parsed.json, parsed.nats_url) == ("decode-0", "both", True, "nats://y")
    assert get_args(Role) == ROLES


@pytest.mark.parametrize("wanted", [None, "prefill"])
def test_the_status_shows_the_role_and_the_wanted_one(wanted: Role | None) -> None:
    worker = WorkerStatus(alive=True, last_seen_s=0.1, heartbeat=make_heartbeat(role="decode"), wanted_role=wanted)
    status = ClusterStatus(
        policy="p", model="m", workers=(worker,), sessions=(), num_sessions=0, num_rounds_in_flight=0, counters={}
    )
    console = Console(file=io.StringIO(), width=80)
    console.print(Group(*describe_status(status)))
    shown: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("decode -> prefill" in " ".join(shown.split())) == (wanted is not None)
    assert "…" not in shown
    (described,) = status_for_programs(status)["workers"]
    assert (described["heartbeat"]["role"], described["wanted_role"]) == ("decode", wanted)
