"""`ampd explain`: what it shows of a session, and how it is asked."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from coordinator_driver import USAGE
from rich.console import Console, Group

import services.explain
from services.cli import build_parser
from services.explain import describe_explanation, show_explanation
from shared import subjects
from shared.bus import BusMessage
from shared.client import AmpdClient
from shared.errors import AmpdError, ErrorCode
from shared.memory_bus import MemoryHub
from shared.messages import (
    ErrorReply,
    ExplainSession,
    OptionExplained,
    RoundExplained,
    SessionExplained,
    Slo,
    Usage,
    decode,
    encode,
)


def option(worker_id: str, placement: Any, **fields: float) -> OptionExplained:
    defaults = {
        "windowed_s": 0.0,
        "queue_s": 0.1,
        "transfer_s": 0.02,
        "prefill_s": 0.3,
        "on_time": 0.8,
        "disturbed": 0.1,
    }
    return OptionExplained(
        worker_id=worker_id, placement=placement, num_new_tokens=123, num_moved_tokens=456, **{**defaults, **fields}
    )


def usage() -> Usage:
    kept = {name: getattr(USAGE, name) for name in USAGE.__struct_fields__}
    return Usage(**{**kept, "queued_s": 0.111, "transfer_s": 0.022, "prefill_s": 0.333})


EXPLAINED = SessionExplained(
    session="s",
    policy="adaptive",
    rounds=(
        RoundExplained(
            round=0,
            attempt=1,
            placement="remote",
            worker_id="p",
            reason="+0.70 rounds on time",
            options=(option("d", "local", queue_s=9.0, on_time=0.01), option("p", "remote")),
            chosen_index=1,
            slo=Slo(ttft_s=0.4, itl_s=0.05),
            ttft_s=0.5,
            tpot_s=0.04,
            usage=usage(),
        ),
        RoundExplained(
            round=1,
            attempt=2,
            placement="local",
            worker_id="d",
            reason="not known",
            options=(),
            chosen_index=-1,
            slo=Slo(),
        ),
    ),
)


def render(explained: SessionExplained) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(Group(*describe_explanation(explained)))
    return console.file.getvalue()


def test_every_round_shows_its_options_and_predicted_against_measured() -> None:
    shown = render(EXPLAINED)
    lines = shown.splitlines()
    assert "policy adaptive" in lines[0]
    assert "round 0: remote on p, +0.70 rounds on time" in shown
    local = next(line for line in lines if "local d" in line)
    assert local.split()[-8:] == ["123", "456", "9000.0", "20.0", "300.0", "9320.0", "1%", "0.10"]
    assert next(line for line in lines if "remote p" in line).strip().startswith("*"), "the chosen one is marked"
    by_name = {
        name: line.split()[-3:] for line in lines for name in ("queue", "first token") if line.strip().startswith(name)
    }
    assert by_name == {"queue": ["100.0", "111.0", "-"], "first token": ["420.0", "500.0", "400.0"]}
    assert "round 1, attempt 2: local on d, not known" in shown


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_shows_it_too(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(Group(*describe_explanation(EXPLAINED)))
    assert "round 0" in console.file.getvalue()


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MemoryHub]:
    """A coordinator that knows session s of tenant t, reached by whatever URL."""
    hub = MemoryHub()
    coordinator = await hub.connect("coordinator")

    async def answer(message: BusMessage) -> None:
        request = decode(message.data)
        assert isinstance(request, ExplainSession)
        known = (request.tenant, request.session) == ("t", "s")
        refusal = ErrorReply(code=ErrorCode.UNKNOWN_SESSION, message="no such session")
        await message.respond(encode(EXPLAINED if known else refusal))

    await coordinator.subscribe(subjects.EXPLAIN, answer)

    async def connect(url: str, *, name: str, tenant: str) -> AmpdClient:
        return AmpdClient(await hub.connect(name), tenant=tenant, owns_bus=True)

    monkeypatch.setattr(services.explain, "connect_to_cluster", connect)
    yield hub
    await coordinator.close()


async def test_the_answer_is_shown_for_people_and_for_programs(hub: MemoryHub) -> None:
    for as_json in (False, True):
        console = Console(file=io.StringIO(), width=120)
        assert await show_explanation("nats://x", tenant="t", session="s", as_json=as_json, console=console) == 0
        shown = console.file.getvalue()
        if as_json:
            assert json.loads(shown)["rounds"][0]["worker_id"] == "p"
        else:
            assert shown == render(EXPLAINED)
    with pytest.raises(AmpdError) as refused:
        await show_explanation("nats://x", tenant="t", session="other", as_json=False, console=Console())
    assert refused.value.code == ErrorCode.UNKNOWN_SESSION


def test_the_subcommand_takes_a_session_a_tenant_and_json() -> None:
    parsed = build_parser().parse_args(["explain", "s1", "--tenant", "t1", "--json", "--nats-url", "nats://y"])
    assert (parsed.session, parsed.tenant, parsed.json, parsed.nats_url) == ("s1", "t1", True, "nats://y")
