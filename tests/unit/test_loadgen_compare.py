"""`loadgen compare`: percentiles of runs, contenders, a simulated comparison end to end, and what a live one starts."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from loadgen.cli import build_parser, main
from loadgen.compare import find_goodput, summarise_cells
from loadgen.compare_runners import LiveRunner, rescale_record, run_logged, stretch_session
from loadgen.contenders import Contender, WorkerSpec, make_contenders, parse_workers
from loadgen.measured import select_measured
from loadgen.percentiles import collect_runs, percentile_of_runs, weighted_percentiles
from loadgen.records import RoundError, RoundRecord, RunInfo, encode_record, read_records
from loadgen.report import attains_p99_itl, build_report
from loadgen.synth import synthesise
from loadgen.traces import read_trace, write_trace
from loadgen.workload import Workload, choose_workload, plan_workload
from services.cli import build_parser as build_ampd_parser
from services.cli import split_at_double_dash
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo, Usage

SLO = Slo(ttft_s=0.5, itl_s=0.05)
METRICS = ("attainment", "p99_itl_attainment", "session_attainment", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "hotpotqa.jsonl"
    write_trace(path, synthesise("hotpotqa", 24, 5))
    return path


def record(index: int = 0, *, gaps: tuple[tuple[int, float], ...], expanded: bool = False) -> RoundRecord:
    """A round of session 0 sent at 1 s, its first token at 1.25 s; with its gaps counted, or as token times."""
    expansion = [gap_s for count, gap_s in gaps for _ in range(count)]
    times = tuple(itertools.accumulate(expansion, initial=1.25))
    usage = Usage(
        num_history_tokens=0,
        num_input_tokens=5,
        num_cached_tokens=0,
        num_output_tokens=len(times),
        prefill="local",
        prefill_worker="w",
        decode_worker="w",
        queued_s=0.125,
    )
    return RoundRecord(
        session_index=0,
        session_id="s",
        round=index,
        planned_input_tokens=5,
        planned_output_tokens=len(times),
        delay_s=0.5,
        state="completed",
        due_s=1.0,
        sent_s=1.0,
        first_token_s=1.25,
        finished_s=times[-1],
        token_times_s=times if expanded else times[:1],
        gaps=() if expanded else gaps,
        usage=usage,
    )


def run_info(rounds: int, **more: Any) -> RunInfo:
    return RunInfo(
        kind="simulated",
        policy="ampd",
        model="m",
        seed=0,
        slo=SLO,
        rounds_offered=rounds,
        sessions_offered=1,
        config={},
        trace={},
        machine={},
        **more,
    )


# ------------------------------------------------------------------------------- gaps in runs


def test_percentiles_of_runs_are_those_of_the_expanded_values() -> None:
    seed = random.randrange(10**6)
    draws = random.Random(seed)
    shares = (0.0, 0.01, 0.5, 0.9, 0.99, 1.0)
    for _ in range(300):
        runs = [(draws.randint(1, 9), draws.choice((0.01, 0.02, draws.random()))) for _ in range(draws.randint(1, 12))]
        expanded = [value for count, value in runs for _ in range(count)]
        expected = [float(np.percentile(expanded, 100 * share)) for share in shares]
        values, counts = collect_runs(runs)
        assert weighted_percentiles(values, counts, shares) == pytest.approx(expected, abs=1e-12), f"seed {seed}"
        one_by_one = [percentile_of_runs(runs, share) for share in shares]
        assert one_by_one == pytest.approx(expected, abs=1e-12), f"seed {seed}"


def test_millions_of_tokens_are_not_expanded() -> None:
    values, counts = collect_runs([(10**12, 0.01), (10**9, 0.5)])
    assert weighted_percentiles(values, counts, (0.5, 0.99, 1.0)) == [0.01, 0.01, 0.5]
    assert percentile_of_runs([(10**12, 0.01), (10**11, 0.5)], 0.99) == 0.5


def test_a_record_with_counted_gaps_reports_as_one_with_token_times() -> None:
    gaps = ((3, 0.0625), (1, 0.25), (2, 0.03125), (40, 0.0078125))
    counted, expanded = record(gaps=gaps), record(gaps=gaps, expanded=True)
    assert counted.itls_s == pytest.approx(expanded.itls_s)
    assert counted.num_output_tokens == expanded.num_output_tokens == 47
    assert counted.tpot_s == pytest.approx(expanded.tpot_s)
    assert attains_p99_itl(counted, SLO) == attains_p99_itl(expanded, SLO)
    reports = [build_report(run_info(1), [one]) for one in (counted, expanded)]
    assert reports[0] == reports[1]
    assert reports[0]["itl_s"]["count"] == 46


def test_records_with_gaps_read_back_equal(tmp_path: Path) -> None:
    one = record(gaps=((3, 0.0625), (1, 0.25)))
    (tmp_path / "rounds.jsonl").write_bytes(encode_record(one))
    assert read_records(tmp_path / "rounds.jsonl") == [one]


def test_a_round_never_sent_belongs_to_the_time_of_the_one_before() -> None:
    failed = msgspec.structs.replace(record(gaps=()), state="failed", error=RoundError("overloaded", "no"))
    unsent = msgspec.structs.replace(
        record(1, gaps=()), state="not_sent", due_s=None, sent_s=None, error=RoundError("not_sent", "no")
    )
    inside = select_measured(run_info(2, warm_up_s=0.5, until_s=2.0), [failed, unsent])
    assert (inside.rounds_offered, inside.sessions_offered, len(inside.of_sessions)) == (2, 1, 2)
    outside = select_measured(run_info(2, warm_up_s=1.5), [failed, unsent])
    assert (outside.rounds_offered, outside.sessions_offered, len(outside.of_sessions)) == (0, 0, 0)


# --------------------------------------------------------------------------------- contenders


def test_contenders_have_their_own_workers_and_variant() -> None:
    default = parse_workers("prefill:8x2,decode:8x2")
    contenders = make_contenders(
        ["remote", "adaptive"],
        default,
        ["adaptive=both:16x2"],
        ["adaptive:staging"],
        ["remote:routing.chunk.chunk_tokens=512"],
    )
    assert contenders[0].workers == default
    assert contenders[0].policy_options == ("routing.chunk.chunk_tokens=512",)
    assert contenders[0].disabled_parts == ()
    assert contenders[1].workers == (WorkerSpec(role="both", count=16, parallel_degree=2),)
    assert contenders[1].disabled_parts == ("staging",)
    assert contenders[1].describe_workers() == "16 both x 2"


@pytest.mark.parametrize(
    "spec", ["", "prefill", "prefill:8x2", "decode:0", "decode:2x0", "decode:1,decode:2", "gpu:1", "decode:x2"]
)
def test_clusters_that_cannot_be_are_refused(spec: str) -> None:
    with pytest.raises(AmpdError, match="cluster"):
        parse_workers(spec)


def test_goodput_and_spread() -> None:
    def run(rate: float, seed: int, attainment: float) -> dict[str, Any]:
        return {"policy": "p", "rate": rate, "seed": seed, "numbers": {"attainment": attainment}}

    runs = [run(1, 0, 1.0), run(1, 1, 0.9), run(2, 0, 0.95), run(2, 1, 0.87), run(3, 0, 0.5), run(3, 1, 0.4)]
    assert find_goodput(runs, "p") == 2
    assert find_goodput(runs[4:], "p") is None
    first = summarise_cells(runs)[0]["numbers"]["attainment"]
    assert first == {"mean": 0.95, "sd": pytest.approx(0.070711, abs=1e-6), "min": 0.9, "max": 1.0}


# ---------------------------------------------------------------------------------- simulated


def compare(trace: Path, out: Path, *more: str) -> int:
    cluster = ["--cluster", "prefill:1x2,decode:2x2"]
    slo = ["--ttft-slo", "0.5", "--itl-slo", "0.05"]
    base = ["compare", str(trace), "--simulate", "--profile", "h100-qwen3-32b", *cluster, *slo, "--out", str(out)]
    return main([*base, *more])


@pytest.fixture(scope="module")
def compared(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    what = ("--policies", "remote,ampd,colocated", "--rates", "8,4", "--seeds", "0,1")
    assert compare(trace, out, *what, "--cluster", "colocated=both:3x2") == 0
    return out


def test_the_comparison_has_every_number(compared: Path) -> None:
    comparison = json.loads((compared / "compare.json").read_text())
    assert (comparison["schema"], comparison["kind"], comparison["failures"]) == ("ampd-compare/1", "simulated", [])
    keys = [(run["policy"], run["rate"], run["seed"]) for run in comparison["runs"]]
    assert keys == list(itertools.product(("remote", "ampd", "colocated"), (4.0, 8.0), (0, 1)))
    assert len(comparison["cells"]) == 6
    for run in comparison["runs"]:
        report = json.loads((compared / run["folder"] / "report.json").read_text())
        assert run["numbers"]["attainment"] == report["slo"]["attainment"]
        assert run["numbers"]["ttft_p99_s"] == report["ttft_s"]["p99"]
        assert run["numbers"]["kv_bytes_moved"] == report["kv"]["bytes_moved"]
        assert run["simulation"]["num_events"] > 0
        assert (compared / run["folder"] / "rounds.jsonl").exists() == (run["seed"] == 0)
    for cell in comparison["cells"]:
        numbers = [
            run["numbers"]
            for run in comparison["runs"]
            if (run["policy"], run["rate"]) == (cell["policy"], cell["rate"])
        ]
        assert cell["num_runs"] == 2
        for name in METRICS:
            spread = cell["numbers"][name]
            assert spread["min"] <= spread["mean"] <= spread["max"]
            assert spread["mean"] == pytest.approx(sum(one[name] for one in numbers) / 2, abs=1e-6)
    shares = {run["policy"]: run["numbers"]["local_share"] for run in comparison["runs"]}
    assert (shares["remote"], shares["colocated"]) == (0.0, 1.0)
    assert comparison["contenders"][2]["cluster"] == "3 both x 2"
    assert set(comparison["goodput"]) == set(shares)


def test_every_policy_sees_the_same_arrivals(compared: Path) -> None:
    def read_offers(folder: str) -> list[tuple[Any, ...]]:
        records = read_records(compared / "runs" / folder / "rounds.jsonl")
        return [
            (
                one.session_index,
                one.session_id,
                one.round,
                one.planned_input_tokens,
                one.planned_output_tokens,
                one.delay_s,
                one.due_s if one.round == 0 else None,
            )
            for one in records
        ]

    for rate in (4, 8):
        offers = [read_offers(f"{policy}-rate-{rate}-seed-0") for policy in ("remote", "ampd", "colocated")]
        assert offers[0] == offers[1] == offers[2]
        assert len(offers[0]) > 24
    assert read_offers("remote-rate-4-seed-0") != read_offers("remote-rate-8-seed-0")


def test_plots_are_drawn(compared: Path) -> None:
    for name in ("attainment.png", "distributions.png", "lanes.png"):
        assert (compared / name).read_bytes().startswith(b"\x89PNG")


def test_the_table_names_every_policy(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--policies", "adaptive,local", "--rates", "3", "--sessions", "8", "--disable", "adaptive:staging")
    assert compare(trace, tmp_path, *more) == 0
    out = capsys.readouterr().out
    for expected in ("adaptive", "local", "P99 ITL", "KV moved", "100.0", "compare.json"):
        assert expected in out


def test_json_is_all_that_standard_output_gets(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(trace, tmp_path, "--policies", "local", "--rates", "3", "--sessions", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "compare.json").read_text())


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--policies", "no-such"], "adaptive"),
        (["--policies", "remote,"], "--policies"),
        (["--rates", "0"], "--rates"),
        (["--rates", "1,1"], "twice"),
        (["--profile", "no-such"], "h100-qwen3-32b"),
        (["--cluster", "ampd=both:2"], "not compared"),
        (["--cluster", "decode:2x3"], "parallel degree"),
        (["--disable", "staging"], "--disable"),
        (["--policy-option", "remote:routing.no_such=1"], "no_such"),
        (["--engine", "emulated"], "--simulate"),
        (["--plot-rate", "9"], "--plot-rate"),
        (["--sessions", "4", "--duration", "9"], "--duration"),
    ],
)
def test_wrong_command_lines_exit_with_2(
    trace: Path, tmp_path: Path, more: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["compare", str(trace), "--simulate", "--profile", "h100-qwen3-32b", "--policies", "remote", "--rates", "1"]
    cluster = ["--cluster", "prefill:1x2,decode:1x2"]
    try:
        status = main([*base, *cluster, *more, "--out", str(tmp_path / "out")])
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    assert status == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


def test_a_simulated_cluster_must_be_said(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["compare", str(trace), "--simulate", "--profile", "h100-qwen3-32b", "--policies", "remote", "--rates", "1"]
    assert main([*base, "--out", str(tmp_path)]) == 2
    assert "--cluster" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- live

CONTENDER = Contender(
    policy="ampd",
    workers=parse_workers("prefill:1x2,decode:3x2"),
    disabled_parts=("staging",),
    policy_options=("routing.alpha=0.5",),
)


def make_runner(time_scale: float) -> LiveRunner:
    return LiveRunner(
        slo=SLO,
        warm_up=0.0,
        trace=[],
        deadline=100.0,
        time_scale=time_scale,
        engine="emulated",
        cluster_flags=("--engine", "emulated", "--profile", "h100-qwen3-32b", "--time-scale", repr(time_scale)),
    )


def test_a_live_run_is_stretched_by_the_time_scale(trace: Path, tmp_path: Path) -> None:
    workload = Workload(file=str(trace), rate=4.0, seed=3, max_delay=2.0, max_context=4000)
    argv = make_runner(10.0).build_command(CONTENDER, workload, tmp_path)
    assert argv[:4] == [sys.executable, "-m", "services.cli", "run"]
    own, command = split_at_double_dash(argv[3:])
    cluster = build_ampd_parser().parse_args(own)
    assert (cluster.prefill, cluster.decode, cluster.both, cluster.parallel_degree) == (1, 3, 0, 2)
    assert (cluster.policy, cluster.disable) == ("ampd", ["staging"])
    assert cluster.policy_option == ["routing.alpha=0.5", "window_s=100.0"], "statistics cover 10 s of the profile's"
    assert (cluster.engine, cluster.time_scale) == ("emulated", 10.0)
    assert command is not None
    assert command[:3] == [sys.executable, "-m", "loadgen"]
    replay = build_parser().parse_args(command[3:])
    assert (replay.rate, replay.seed, replay.max_context) == (0.4, 3, 4000)
    assert (replay.ttft_slo, replay.itl_slo) == pytest.approx((5.0, 0.5))
    assert (replay.max_delay, replay.deadline) == pytest.approx((20.0, 1000.0))
    assert (replay.out, replay.sessions) == (tmp_path, None)


@pytest.mark.parametrize(("time_scale", "control_scale"), [("1", 1.0), ("8", 0.125)])
def test_a_simulation_is_told_of_the_time_scale_of_what_it_is_compared_with(
    trace: Path, tmp_path: Path, time_scale: str, control_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planner.simulator import run_simulation

    setups: list[Any] = []
    simulate_plan = run_simulation.simulate_plan

    def watch(setup: Any, *arguments: Any) -> Any:
        setups.append(setup)
        return simulate_plan(setup, *arguments)

    monkeypatch.setattr(run_simulation, "simulate_plan", watch)
    flags = ["--simulate", "--profile", "h100-qwen3-32b", "--policies", "remote", "--rates", "4", "--sessions", "3"]
    flags += ["--prefill", "1", "--decode", "1", "--parallel-degree", "2", "--time-scale", time_scale]
    arguments = build_parser().parse_args(["compare", str(trace), *flags, "--out", str(tmp_path)])
    assert arguments.run(arguments) == 0
    assert [setup.control_scale for setup in setups] == [control_scale]


def test_a_stretched_plan_is_the_plan_times_the_scale(trace: Path) -> None:
    workload = Workload(file=str(trace), rate=4.0, seed=3, sessions=30, max_delay=2.0)
    chosen = choose_workload(list(read_trace(trace)), workload)
    plan = plan_workload(chosen, workload)
    slow = Workload(file=str(trace), rate=0.4, seed=3, max_delay=20.0)
    stretched = plan_workload([stretch_session(one, 10.0) for one in chosen], slow)
    assert [one.arrival_s for one in stretched.sessions] == pytest.approx([10 * one.arrival_s for one in plan.sessions])
    for one, other in zip(plan.sessions, stretched.sessions, strict=True):
        assert [r.delay_s for r in other.rounds] == pytest.approx([10 * r.delay_s for r in one.rounds])
        assert [r.input_tokens for r in other.rounds] == [r.input_tokens for r in one.rounds]


def test_measured_times_are_divided_by_the_scale() -> None:
    one = record(gaps=((3, 0.0625), (1, 0.25)), expanded=True)
    half = rescale_record(one, 0.5)
    assert (half.sent_s, half.first_token_s) == (0.5, 0.625)
    assert one.ttft_s is not None
    assert half.ttft_s == one.ttft_s / 2
    assert half.itls_s == pytest.approx([itl_s / 2 for itl_s in one.itls_s])
    assert half.delay_s == 0.25
    assert half.usage is not None
    assert half.usage.queued_s == 0.0625
    assert rescale_record(one, 1.0) == one


def test_a_command_that_fails_is_told_with_the_end_of_its_log(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "import sys; print('no model here'); sys.exit(1)"]
    monkeypatch.setattr(LiveRunner, "build_command", lambda *_: failing)
    workload = Workload(file=str(trace), rate=4.0)
    with pytest.raises(AmpdError, match="no model here") as caught:
        make_runner(1.0)(CONTENDER, workload, list(read_trace(trace)), tmp_path)
    assert caught.value.code is ErrorCode.INTERNAL
    assert run_logged([sys.executable, "-c", "print('fine')"], tmp_path / "log") == 0
    assert (tmp_path / "log").read_text() == "fine\n"


def test_a_run_that_cannot_be_made_is_noted_and_the_status_is_1(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = [sys.executable, "-c", "import sys; print('no model here'); sys.exit(1)"]
    monkeypatch.setattr(LiveRunner, "build_command", lambda *_: failing)
    assert main(["compare", str(trace), "--policies", "remote,local", "--rates", "1", "--out", str(tmp_path)]) == 1
    comparison = json.loads((tmp_path / "compare.json").read_text())
    assert [one["policy"] for one in comparison["failures"]] == ["remote", "local"]
    assert comparison["runs"] == []
    assert "no model here" in capsys.readouterr().out


def test_live_workers_have_one_number_of_devices() -> None:
    mixed = Contender(policy="ampd", workers=parse_workers("prefill:1x2,decode:1x4"))
    with pytest.raises(AmpdError, match="--simulate"):
        make_runner(1.0).check([mixed])
