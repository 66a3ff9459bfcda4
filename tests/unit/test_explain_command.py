"""`ampd explain`: what it shows of a session, and how it is asked."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from coordinator_driver import USAGE
from rich.console import Console, Group

import services.explain
from services.cli import build_parser
from services.explain import describe_explanation, explanation_for_programs, show_explanation
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
    defaults: dict[str, Any] = {
        "num_moved_tokens": 456 if placement == "remote" else 0,
        "windowed_s": 0.0,
        "queue_s": 0.1,
        "transfer_s": 0.02,
        "prefill_s": 0.3,
        "on_time": 0.8,
        "disturbed": 0.1,
    }
    return OptionExplained(worker_id=worker_id, placement=placement, num_new_tokens=123, **{**defaults, **fields})


def usage(**fields: Any) -> Usage:
    return msgspec.structs.replace(USAGE, queued_s=0.111, transfer_s=0.022, prefill_s=0.333, **fields)


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
    assert local.split()[-8:] == ["123", "0", "9000.0", "20.0", "300.0", "9320.0", "1%", "0.10"]
    assert next(line for line in lines if "remote p" in line).strip().startswith("*"), "the chosen one is marked"
    by_name = {
        name: line.split()[-3:] for line in lines for name in ("queue", "first token") if line.strip().startswith(name)
    }
    assert by_name == {"queue": ["100.0", "111.0", "-"], "first token": ["420.0", "500.0", "400.0"]}
    assert "round 1, attempt 2: local on d, not known" in shown


def local_round(chosen: OptionExplained, measured: Usage | None) -> SessionExplained:
    options = (option("d", "local"), chosen)
    round_ = msgspec.structs.replace(
        EXPLAINED.rounds[0],
        placement="local",
        worker_id=chosen.worker_id,
        options=options,
        chosen_index=1,
        usage=measured,
    )
    return msgspec.structs.replace(EXPLAINED, rounds=(round_,))


@pytest.mark.parametrize(
    ("explained", "shown"),
    [
        (local_round(option("m", "local", num_moved_tokens=20_000), None), "moves the session to m, +0.70"),
        (
            local_round(option("m", "local", num_moved_tokens=20_000), usage(moved_from="d", num_moved_tokens=20_000)),
            "moves the session to m from d, +0.70",
        ),
        (local_round(option("m", "local"), usage(moved_from="drained")), "moves the session to m from drained, +0.70"),
        (local_round(option("m", "local"), usage()), None),
        (EXPLAINED, None),
    ],
)
def test_a_round_says_that_its_session_moves(explained: SessionExplained, shown: str | None) -> None:
    line = next(line for line in render(explained).splitlines() if line.startswith("round 0"))
    assert (shown in line) if shown is not None else ("moves" not in line)
    assert explanation_for_programs(explained)["rounds"][0]["moves_session"] == (shown is not None)


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
            answer = json.loads(shown)
            assert answer["rounds"][0]["worker_id"] == "p"
            assert [one["moves_session"] for one in answer["rounds"]] == [False, False]
        else:
            assert shown == render(EXPLAINED)
    with pytest.raises(AmpdError) as refused:
        await show_explanation("nats://x", tenant="t", session="other", as_json=False, console=Console())
    assert refused.value.code == ErrorCode.UNKNOWN_SESSION


def test_the_subcommand_takes_a_session_a_tenant_and_json() -> None:
    parsed = build_parser().parse_args(["explain", "s1", "--tenant", "t1", "--json", "--nats-url", "nats://y"])
    assert (parsed.session, parsed.tenant, parsed.json, parsed.nats_url) == ("s1", "t1", True, "nats://y")
