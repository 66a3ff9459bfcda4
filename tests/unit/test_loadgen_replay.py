"""A replay end to end over a MemoryBus, and the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from heartbeats import make_heartbeat
from rich.console import Console

from loadgen.cli import main
from loadgen.records import RoundRecord, read_records, read_run
from loadgen.replay import ReplayOptions, replay
from loadgen.run import ReplayConfig, plan_replay, render_again, replay_trace
from shared import subjects
from shared.bus import BusMessage
from shared.client import AmpdClient
from shared.errors import AmpdError, ErrorCode
from shared.memory_bus import MemoryBus, MemoryHub
from shared.messages import (
    ChatInput,
    CloseSession,
    ClusterStatus,
    ErrorReply,
    GetStatus,
    Message,
    OpenSession,
    RoundAccepted,
    RoundFinished,
    RoundTokens,
    SessionClosed,
    SessionOpened,
    Slo,
    StepTimes,
    SubmitRound,
    TokensInput,
    Usage,
    WorkerStatus,
    decode,
    encode,
    pack_token_ids,
    unpack_token_ids,
)

VOCAB_SIZE = 1000


class FakeCluster:
    """Answers every round at once with as many tokens as were asked for. Even rounds are remote, odd ones local."""

    def __init__(self, bus: MemoryBus) -> None:
        self.bus = bus
        self.max_context_tokens = 4096
        self.opened: dict[str, OpenSession] = {}
        self.open_now: set[str] = set()
        self.most_open = 0
        self.rounds: dict[str, list[SubmitRound]] = {}
        self.refuse: dict[tuple[int, int], ErrorCode] = {}  # by (session number, round)
        self.silent: set[tuple[int, int]] = set()
        self.submitted = asyncio.Event()
        self.step_times: dict[str, StepTimes] = {}

    async def start(self) -> None:
        await self.bus.subscribe(subjects.ALL_SESSION_REQUESTS, self.on_request)
        await self.bus.subscribe(subjects.STATUS, self.on_request)

    async def on_request(self, message: BusMessage) -> None:
        request = decode(message.data)
        if isinstance(request, GetStatus):
            await message.respond(encode(self.status()))
            return
        session = subjects.parse_session_request(message.subject)[1]
        reply = self.answer(session, request)
        await message.respond(encode(reply))
        if isinstance(request, SubmitRound) and isinstance(reply, RoundAccepted):
            if (self.number(session), reply.round) not in self.silent:
                await self.play(session, reply.round, request)
            self.submitted.set()

    def answer(self, session: str, request: Message) -> Message:
        match request:
            case OpenSession():
                self.opened[session] = request
                self.open_now.add(session)
                self.most_open = max(self.most_open, len(self.open_now))
                return SessionOpened(
                    session=session,
                    model="fake",
                    max_context_tokens=self.max_context_tokens,
                    vocab_size=VOCAB_SIZE,
                )
            case CloseSession():
                self.open_now.discard(session)
                return SessionClosed(session=session, num_rounds=len(self.rounds.get(session, ())))
            case SubmitRound():
                index = len(self.rounds.setdefault(session, []))
                code = self.refuse.get((self.number(session), index))
                if code is not None:
                    return ErrorReply(code=code, message="refused by the test")
                self.rounds[session].append(request)
                stream = subjects.round_stream("default", session, index)
                return RoundAccepted(
                    session=session, round=index, stream=stream, num_history_tokens=0, num_input_tokens=1
                )
        raise AssertionError(request)

    @staticmethod
    def number(session: str) -> int:
        return int(session.rsplit("-", 1)[1])

    def status(self) -> ClusterStatus:
        return ClusterStatus(
            policy="remote",
            model="fake",
            workers=tuple(
                WorkerStatus(alive=True, last_seen_s=0.1, heartbeat=make_heartbeat(name, step_times=times))
                for name, times in self.step_times.items()
            ),
            sessions=(),
            num_sessions=0,
            num_rounds_in_flight=0,
            counters={},
        )

    async def play(self, session: str, index: int, request: SubmitRound) -> None:
        subject = subjects.round_stream("default", session, index)
        count = request.stop.max_output_tokens
        for start in range(count):
            tokens = RoundTokens(
                session=session,
                round=index,
                attempt=1,
                seq=start,
                start_index=start,
                token_ids=pack_token_ids([start]),
                text="w ",
            )
            await self.bus.publish(subject, encode(tokens))
        usage = Usage(
            num_history_tokens=0,
            num_input_tokens=1,
            num_cached_tokens=0,
            num_output_tokens=count,
            prefill="local" if index % 2 else "remote",
            prefill_worker="p0",
            decode_worker="d0",
            kv_bytes_written=0 if index % 2 else 64,
        )
        end = RoundFinished(
            session=session,
            round=index,
            attempt=1,
            seq=count,
            num_output_tokens=count,
            finish_reason="length",
            usage=usage,
        )
        await self.bus.publish(subject, encode(end))


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    hub = MemoryHub()
    cluster = FakeCluster(await hub.connect("cluster"))
    await cluster.start()
    yield cluster
    await cluster.bus.close()


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[AmpdClient]:
    bus = await cluster.bus._hub.connect("loadgen")
    async with AmpdClient(bus) as client:
        yield client
    await bus.close()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    rounds = [
        {"input_tokens": 12, "output_tokens": 4, "delay_s": None},
        {"input_tokens": 3, "output_tokens": 2, "delay_s": 0.01},
        {"input_tokens": 2, "output_tokens": 1, "delay_s": None},
    ]
    lines = [{"session_id": f"t/{index}", "arrival_s": 0.0, "rounds": rounds} for index in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_for(trace: Path) -> ReplayConfig:
    return ReplayConfig(file=str(trace), rate=200.0, seed=5, ttft_slo=30.0, itl_slo=30.0)


async def test_replay_writes_everything(client: AmpdClient, cluster: FakeCluster, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    config = config_for(trace)
    report = await replay_trace(client, config, plan_replay(config), out, Console(quiet=True))

    assert report["rounds"] == {"offered": 12, "completed": 12, "failed": 0, "attained": 12}
    assert report["slo"]["attainment"] == report["slo"]["session_attainment"] == 1.0
    assert report["prefill"] == {"local": 4, "remote": 8, "local_share": pytest.approx(1 / 3, abs=1e-6)}
    assert report["kv"]["bytes_moved"] == 8 * 64
    assert (report["policy"], report["model"], report["seed"]) == ("remote", "fake", 5)
    assert report["config"]["rate"] == 200.0
    assert report == json.loads((out / "report.json").read_text())
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")

    records = read_records(out / "rounds.jsonl")
    assert {(one.session_index, one.round) for one in records} == {(s, r) for s in range(4) for r in range(3)}
    for one in records:
        assert one.sent_s is not None
        assert one.due_s is not None
        assert one.first_token_s is not None
        assert one.finished_s is not None
        assert one.due_s <= one.sent_s <= one.first_token_s <= one.finished_s
        assert len(one.token_times_s) == one.planned_output_tokens
    by_session = {(one.session_index, one.round): one for one in records}
    for session in range(4):
        ended_s, due_s = by_session[session, 0].finished_s, by_session[session, 1].due_s
        assert ended_s is not None
        assert due_s == pytest.approx(ended_s + 0.01, abs=1e-5)

    assert {one.session for one in records} == {name for name in cluster.opened if "probe" not in name}
    assert all(one.session is not None and cluster.number(one.session) == one.session_index for one in records)
    assert json.loads((out / "rounds.jsonl").read_text().splitlines()[0])["session"] == records[0].session

    assert not cluster.open_now
    submitted = [one for name, rounds in cluster.rounds.items() if "probe" not in name for one in rounds]
    assert all(one.stop.ignore_eos for one in submitted)
    for one in submitted:
        assert isinstance(one.input, TokensInput)
        ids = unpack_token_ids(one.input.token_ids)
        assert len(ids) in (12, 3, 2)
        assert all(250 <= token_id < VOCAB_SIZE for token_id in ids)

    again = render_again(out, Console(quiet=True), None, None)
    assert again == report
    strict = render_again(out, Console(quiet=True), 1e-9, None)
    assert strict["slo"]["attainment"] == 0.0
    assert json.loads((out / "report.json").read_text()) == report  # another SLO changes no file


async def test_what_the_workers_steps_took_is_written_down(
    client: AmpdClient, cluster: FakeCluster, trace: Path, tmp_path: Path
) -> None:
    measured = StepTimes(decode_s=3.0, decode_profile_s=2.0)
    cluster.step_times = {"decode-0": measured, "decode-1": StepTimes()}
    config = config_for(trace)
    await replay_trace(client, config, plan_replay(config), tmp_path, Console(quiet=True))
    assert read_run(tmp_path / "run.json").step_times == {"decode-0": measured}, "the other has no profile"


async def test_a_failed_round_stops_its_session_and_counts(
    client: AmpdClient, cluster: FakeCluster, trace: Path, tmp_path: Path
) -> None:
    cluster.refuse[1, 1] = ErrorCode.NO_CAPACITY
    config = config_for(trace)
    report = await replay_trace(client, config, plan_replay(config), tmp_path, Console(quiet=True))
    assert report["rounds"] == {"offered": 12, "completed": 10, "failed": 2, "attained": 10}
    assert report["slo"]["attainment"] == pytest.approx(10 / 12, abs=1e-6)
    assert report["slo"]["session_attainment"] == 0.75
    assert report["errors"] == {"no_capacity": 1, "not_sent": 1}
    records = read_records(tmp_path / "rounds.jsonl")
    assert len(records) == 12
    assert len({one.session for one in records if one.session_index == 1}) == 1, "whether sent, failed or not sent"
    assert {one.session for one in records} <= set(cluster.opened)
    assert not cluster.open_now


async def test_max_in_flight_bounds_open_sessions(client: AmpdClient, cluster: FakeCluster, trace: Path) -> None:
    plan = plan_replay(replace(config_for(trace), rate=1e6))
    records: list[RoundRecord] = []
    await replay(client, plan, ReplayOptions(seed=0, slo=Slo(), max_in_flight=1), records.append)
    assert len(records) == 12
    assert cluster.most_open == 1


async def test_stopping_a_replay_closes_its_sessions(client: AmpdClient, cluster: FakeCluster, trace: Path) -> None:
    cluster.silent = {(index, 0) for index in range(4)}
    records: list[RoundRecord] = []
    plan = plan_replay(replace(config_for(trace), sessions=1))
    task = asyncio.create_task(replay(client, plan, ReplayOptions(seed=0, slo=Slo()), records.append))
    await cluster.submitted.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not cluster.open_now
    assert not records
    assert not [one for one in asyncio.all_tasks() if one.get_name().startswith(("round-", "session-"))]


async def test_real_text_is_sent_as_chat(client: AmpdClient, cluster: FakeCluster, tmp_path: Path) -> None:
    path = tmp_path / "demo.jsonl"
    assert main(["synth", "tool-use-text", "--sessions", "2", "--seed", "7", "--out", str(path)]) == 0
    config = replace(config_for(path), max_delay=0.0)
    report = await replay_trace(client, config, plan_replay(config), tmp_path, Console(quiet=True))
    assert report["rounds"]["failed"] == 0
    submitted = [one for rounds in cluster.rounds.values() for one in rounds]
    assert submitted
    assert all(isinstance(one.input, ChatInput) and not one.stop.ignore_eos for one in submitted)
    assert all(one.text == "w " * one.planned_output_tokens for one in read_records(tmp_path / "rounds.jsonl"))


async def test_a_trace_too_long_for_the_model_is_refused_before_anything_is_sent(
    client: AmpdClient, cluster: FakeCluster, trace: Path, tmp_path: Path
) -> None:
    cluster.max_context_tokens = 20
    config = config_for(trace)
    with pytest.raises(AmpdError, match="--max-context 20") as caught:
        await replay_trace(client, config, plan_replay(config), tmp_path, Console(quiet=True))
    assert caught.value.code is ErrorCode.CONTEXT_TOO_LONG
    assert not cluster.rounds
    cut = replace(config, max_context=20)
    report = await replay_trace(client, cut, plan_replay(cut), tmp_path, Console(quiet=True))
    assert report["rounds"]["failed"] == 0
    assert report["trace"]["cuts"]["rounds_dropped"] == 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["replay", "{missing}", "--out", "{out}"], "cannot read the trace"),
        (["replay", "{trace}", "--out", "{out}", "--rate", "-1"], "--rate"),
        (["replay", "{trace}", "--out", "{out}", "--rate", "fast"], "above 0"),
        (["replay", "{trace}", "--out", "{out}", "--sessions", "1.5"], "--sessions"),
        (["replay", "{trace}", "--out", "{out}", "--arrivals", "recorded"], "--arrivals poisson"),
        (["replay", "{trace}", "--out", "{trace}"], "--out"),
        (["replay", "{trace}"], "--out"),
        (["synth", "no-such-kind", "--sessions", "3", "--out", "{out}/t.jsonl"], "tool-use-text"),
        (["report", "{missing}"], "--out folder"),
        ([], "COMMAND"),
    ],
)
def test_wrong_command_lines_exit_with_2(
    arguments: list[str], named: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"trace": str(trace), "out": str(tmp_path / "out"), "missing": str(tmp_path / "missing")}
    try:
        status = main([argument.format_map(places) for argument in arguments])
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    assert status == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("command", ["replay", "synth", "report"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert f"example: loadgen {command}" in " ".join(capsys.readouterr().out.split())
