"""`ampd plan` end to end on small made-up traces: the files it writes, several GPU types, and what it refuses."""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
from planning_samples import make_profile

from loadgen.traces import TraceRound, TraceSession, write_trace
from planner.planning import plan_command, simulated
from planner.planning.choose import MARGINS
from planner.planning.plan_command import add_plan_command, load_profile_of, split_profile_name
from planner.planning.plans import SolvedPlan
from planner.planning.simulated import Simulated
from planner.simulator.outcome import Outcome
from services.cli import main
from shared.errors import AmpdError, ErrorCode

PROFILE = "h100-qwen3-32b"
FILES = {"plan.json", "plan.md", "plan.png", "docker-compose.override.yml"}
REPOSITORY = Path(__file__).parents[2]


def write_sessions(path: Path, arrivals: Callable[[int], float], *, known: bool = True, num_sessions: int = 40) -> Path:
    """Short sessions: two rounds of a second in all."""
    draws = random.Random("plan")
    sessions = [
        TraceSession(
            session_id=f"s{index}",
            arrival_s=arrivals(index),
            rounds=(
                TraceRound(input_tokens=draws.randint(300, 1_500), output_tokens=draws.randint(4, 16)),
                TraceRound(input_tokens=draws.randint(50, 300), output_tokens=draws.randint(4, 16), delay_s=0.3),
            ),
            meta={"arrival_known": known},
        )
        for index in range(num_sessions)
    ]
    write_trace(path, iter(sessions))
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sessions a second, evenly."""
    return write_sessions(tmp_path_factory.mktemp("trace") / "short.jsonl", lambda index: 0.5 * index + 0.1)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_plan_command(parser.add_subparsers(required=True))
    return parser.parse_args(["plan", *flags])


def flags_for(trace: Path, out: Path, *more: str, gpus: str = "--gpus=4", plans: str = "0") -> list[str]:
    base = ["--profile", PROFILE, "--trace", str(trace), "--out", str(out), "--ttft-slo", "0.5", "--itl-slo", "0.05"]
    return [*base, gpus, "--plans", plans, *more]


def plan(trace: Path, out: Path, *more: str, gpus: str = "--gpus=4", plans: str = "0") -> dict[str, Any]:
    arguments = parse(*flags_for(trace, out, *more, gpus=gpus, plans=plans))
    assert arguments.command(arguments) == 0
    return read_json((out / "plan.json").read_text())


@pytest.fixture(scope="module")
def made(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plan for 4 GPUs, not simulated."""
    out = tmp_path_factory.mktemp("made") / "new" / "folder"
    plan(trace, out)
    return out


def read_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    value: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return value


# ------------------------------------------------------------------------------------------ files


def test_a_plan_is_written_as_json_page_and_plot(made: Path) -> None:
    told = read_json((made / "plan.json").read_text())
    assert {path.name for path in made.iterdir()} == FILES
    assert told["format"] == "ampd-plan/1"
    assert told["gpus"] == {"h100": 4}
    assert told["profiles"] == {"h100": PROFILE}
    assert told["slo"] == {"ttft_s": 0.5, "itl_s": 0.05}
    assert (told["objective"], told["target"], told["policy"]) == ("goodput", 0.9, "adaptive")
    assert told["num_gpus"] == sum(one["parallel_degree"] * one["replicas"] for one in told["workers"]) <= 4
    for one in told["workers"]:
        assert set(one) == {"role", "gpu_type", "parallel_degree", "replicas"}
        assert one["role"] in ("prefill", "both")
        assert (one["gpu_type"], one["replicas"] > 0) == ("h100", True)
    assert any(one["role"] == "both" for one in told["workers"])
    assert told["solver"]["status"] == "optimal"
    assert 0.0 <= told["solver"]["gap"] <= 1e-4
    assert told["solver"]["seconds"] >= 0.0
    assert (told["simulated"], told["candidates"]) == (None, [])
    assert sum(one["share"] for one in told["binding"]) == pytest.approx(1.0, abs=1e-3)
    assert (made / "plan.png").read_bytes().startswith(b"\x89PNG")
    page = (made / "plan.md").read_text()
    assert page.startswith(f"# {describe(told)}\n")
    assert f"- {told['binding'][0]['constraint']}: {told['binding'][0]['share']:.0%}" in page
    assert "| rounds on time |" in page


def describe(told: dict[str, Any]) -> str:
    return " + ".join(
        f"{one['replicas']} {one['role']} {one['gpu_type']} x {one['parallel_degree']}" for one in told["workers"]
    )


def test_the_page_is_printed_and_where_the_files_are(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = plan(trace, tmp_path, gpus="--gpus=1")
    printed = capsys.readouterr().out
    assert describe(told) in printed
    assert "What limits it" in printed
    assert str(tmp_path) in printed.replace("\n", "")


def test_the_prediction_and_what_further_gpus_bring(made: Path) -> None:
    told = read_json((made / "plan.json").read_text())
    predicted = told["predicted"]
    assert set(predicted) == {
        "rate_sessions_per_s", "attainment", "goodput_sessions_per_s", "capacity_sessions_per_s",
        "ttft_p95_s", "itl_p95_s", "local_share",
    }  # fmt: skip
    assert 0.0 < predicted["attainment"] <= 1.0
    assert predicted["rate_sessions_per_s"] <= predicted["capacity_sessions_per_s"] * (1 + 1e-6)
    assert 0.0 < predicted["itl_p95_s"] <= 0.05
    assert 0.0 <= predicted["local_share"] <= 1.0
    gains = told["further_gpus"]["h100"]
    assert list(gains) == ["1", "2", "4", "8"]
    assert 0.0 <= gains["1"] <= gains["2"] <= gains["4"] <= gains["8"]
    curve = {one["gpus"]: one["capacity_sessions_per_s"] for one in told["goodput_by_gpus"]}
    assert list(curve) == [1, 2, 3, 4, 5, 6, 8]
    assert list(curve.values()) == sorted(curve.values())
    assert curve[4] == pytest.approx(predicted["capacity_sessions_per_s"], rel=0.011), "a plan gives up 1 % at most"
    assert gains["4"] == pytest.approx(curve[8] - curve[4])


def test_the_workload_is_that_of_the_trace(trace: Path, made: Path, tmp_path: Path) -> None:
    told = read_json((made / "plan.json").read_text())["workload"]
    assert (told["sessions"], told["sessions_per_s"]) == (40, pytest.approx(2.0))
    assert told["burstiness"] == pytest.approx(0.0, abs=1e-9), "evenly"
    assert told["rounds_per_session"]["p99"] == 2.0
    assert told["tool_gap_s"] == {"mean": pytest.approx(0.3), "p50": 0.3, "p90": 0.3, "p99": 0.3}
    assert 300 <= told["first_input_tokens"]["p50"] < told["first_input_tokens"]["p99"] <= 1_500
    cut = plan(trace, tmp_path / "cut", "--max-context", "800", "--max-delay", "0.1", "--rate", "7")["workload"]
    assert cut["sessions_per_s"] == 7.0
    assert cut["prompt_tokens"]["p99"] < 800
    assert cut["tool_gap_s"]["p99"] <= 0.1


def test_arrivals_on_mooncakes_grid_are_no_bursts(tmp_path: Path) -> None:
    """Its times are whole multiples of 3 s: those of evenly arriving sessions come in batches of 12."""
    path = write_sessions(tmp_path / "grid.jsonl", lambda index: 3.0 * (index // 12), num_sessions=240)
    assert 0.3 < plan(path, tmp_path / "out")["workload"]["burstiness"] < 2.0
    bursts = write_sessions(tmp_path / "bursts.jsonl", lambda index: 3.1 * (index // 12) + 0.01, num_sessions=240)
    assert plan(bursts, tmp_path / "other")["workload"]["burstiness"] > 5.0


def test_the_override_has_as_many_containers_as_the_plan_workers(trace: Path, tmp_path: Path) -> None:
    told = plan(trace, tmp_path, gpus="--gpus=8")
    text = (tmp_path / "docker-compose.override.yml").read_text()
    found = re.findall(r"^  ([a-z-]+): \{deploy: \{replicas: (\d+)\}\}$", text, flags=re.MULTILINE)
    replicas = {
        role: sum(one["replicas"] for one in told["workers"] if one["role"] == role) for role in ("prefill", "both")
    }
    assert dict(found) == {"prefill-worker": str(replicas["prefill"]), "decode-worker": str(replicas["both"])}
    comments, services = text.split("services:\n")
    assert all(line.startswith("# ") for line in comments.splitlines())
    assert len(services.splitlines()) == len(found) == 2
    compose = (REPOSITORY / "docker-compose.yml").read_text()
    assert all(f"\n  {service}:\n" in compose for service, _ in found), "services that there are"


def test_json_is_all_that_standard_output_gets(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = plan(trace, tmp_path, "--json")
    assert read_json(capsys.readouterr().out) == told


# ------------------------------------------------------------------------------ objectives and types


def test_the_fewest_gpus_serve_the_rate_and_one_fewer_would_not(trace: Path, tmp_path: Path) -> None:
    most = plan(trace, tmp_path / "most", gpus="--gpus=8")["predicted"]["capacity_sessions_per_s"]
    rate = ["--rate", f"{0.4 * most:.6g}"]
    told = plan(trace, tmp_path / "fewest", "--objective", "min-gpus", *rate, gpus="--gpus=8")
    assert told["objective"] == "min-gpus"
    assert told["num_gpus"] < 8
    assert told["predicted"]["rate_sessions_per_s"] == pytest.approx(0.4 * most)
    assert told["predicted"]["capacity_sessions_per_s"] >= 0.4 * most
    plan(trace, tmp_path / "same", "--objective", "min-gpus", *rate, gpus=f"--gpus={told['num_gpus']}")
    with pytest.raises(AmpdError, match="cannot serve"):
        plan(trace, tmp_path / "less", "--objective", "min-gpus", *rate, gpus=f"--gpus={told['num_gpus'] - 1}")


def test_a_lower_latency_takes_more_gpus(trace: Path, tmp_path: Path) -> None:
    rate = ["--rate", "20"]
    fewest = plan(trace, tmp_path / "fewest", "--objective", "min-gpus", *rate, gpus="--gpus=8")
    fastest = plan(trace, tmp_path / "fastest", "--objective", "min-p95", *rate, gpus="--gpus=8")
    assert fastest["num_gpus"] > fewest["num_gpus"]
    assert fastest["predicted"]["ttft_p95_s"] < fewest["predicted"]["ttft_p95_s"]


def test_two_gpu_types_make_one_plan(trace: Path, tmp_path: Path) -> None:
    told = plan(trace, tmp_path, gpus="--gpu-types=h100:2, h200:2")
    assert told["gpus"] == {"h100": 2, "h200": 2}
    assert told["profiles"] == {"h100": PROFILE, "h200": "h200-qwen3-32b"}
    assert {one["gpu_type"] for one in told["workers"]} == {"h100", "h200"}
    assert set(told["further_gpus"]) == {"h100", "h200"}
    alone = plan(trace, tmp_path / "alone", gpus="--gpus=2")
    assert told["predicted"]["capacity_sessions_per_s"] > 1.5 * alone["predicted"]["capacity_sessions_per_s"]


def test_a_profile_of_another_type_is_that_of_the_same_model() -> None:
    """Names of models have dots, which are no endings of files."""
    assert split_profile_name("h100-llama-3.1-70b") == ("h100", "llama-3.1-70b")
    assert split_profile_name("some/where/h100-llama-3.1-70b.json") == ("h100", "llama-3.1-70b")
    assert load_profile_of("h100-llama-3.1-70b", "h200").name == "h200-llama-3.1-70b"
    assert load_profile_of("h100-llama-3.1-70b", "h100").name == "h100-llama-3.1-70b"
    with pytest.raises(AmpdError, match="b200-qwen3-32b"):
        load_profile_of("h100-qwen3-32b", "b200")


def test_a_profile_may_be_a_file(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine-toy.json"
    path.write_bytes(msgspec.json.encode(make_profile("mine-toy")))
    told = plan(trace, tmp_path / "out", "--profile", str(path))
    assert (told["gpus"], told["profiles"]) == ({"mine": 4}, {"mine": "mine-toy"})


# ------------------------------------------------------------------------------------- simulation


def test_the_best_plans_are_simulated_and_the_best_of_them_is_written(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulated, "MEASURED_ROUNDS", 200)
    monkeypatch.setattr(simulated, "MIN_MEASURED_S", 2.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # progress is shown as on a terminal
    told = plan(trace, tmp_path, "--json", gpus="--gpus=2", plans="2")
    printed = capsys.readouterr()
    assert read_json(printed.out) == told, "no progress among it"
    assert "plans simulated" in printed.err
    first, second = told["candidates"]
    assert first["simulated"] == told["simulated"]
    assert first["workers"] == told["workers"] != second["workers"]
    best = told["simulated"]["goodput_sessions_per_s"]
    assert best == told["simulated"]["rate_sessions_per_s"] > 0.0
    assert told["simulated"]["attainment"] >= 0.9
    assert (second["simulated"]["goodput_sessions_per_s"] or 0.0) <= best
    assert told["predicted"]["rate_sessions_per_s"] == best, "side by side"
    page = (tmp_path / "plan.md").read_text()
    assert f"| goodput, sessions/s | {told['predicted']['goodput_sessions_per_s']:.4g} | {best:.4g} |" in page
    assert "## Other plans that were simulated" in page


def outcome_of(attainment: float) -> Outcome:
    numbers = {field.name: 0.0 for field in fields(Outcome)}
    return Outcome(**{**numbers, "attainment": attainment})  # type: ignore[arg-type]


@pytest.mark.parametrize(("needed", "num_tries"), [(1.0, 1), (1.15, 4), (9.0, None)])
def test_the_fewest_gpus_are_planned_with_a_margin_where_the_simulation_asks_for_it(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: float, num_tries: int | None
) -> None:
    """Simulated, a plan attains when the program gives it `needed` times the rate; where none does, the last is told
    with what it attains."""
    tried: list[SolvedPlan] = []

    def simulate(*given: Any) -> list[Simulated]:
        plans = given[2]
        tried.extend(plans)
        share = min(0.99, 0.9 * plans[0].rate / (needed * 60.0))
        return [Simulated(plan=plans[0], rate=60.0, outcome=outcome_of(share), goodput_sessions_per_s=0.0)]

    monkeypatch.setattr(plan_command, "simulate_plans", simulate)
    told = plan(trace, tmp_path, "--objective", "min-gpus", "--rate", "60", gpus="--gpus=12", plans="1")
    assert told["num_gpus"] == tried[-1].num_gpus
    assert [one.num_gpus for one in tried] == sorted(one.num_gpus for one in tried)
    if num_tries is None:
        assert len(tried) == len(MARGINS) or tried[-1].rate < 1.5 * 60.0
        assert told["simulated"]["attainment"] < 0.9
    else:
        assert len(tried) <= num_tries
        assert tried[-1].rate >= needed * 60.0 * (1 - 1e-6)
        assert all(one.rate < needed * 60.0 for one in tried[:-1])
    assert told["predicted"]["rate_sessions_per_s"] == 60.0


def test_a_seed_repeats_itself(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "MEASURED_ROUNDS", 100)
    monkeypatch.setattr(simulated, "MIN_MEASURED_S", 1.0)
    more = ["--objective", "min-p95", "--rate", "8", "--seed"]
    seeds = {"a": "3", "b": "3", "c": "4"}
    told = [plan(trace, tmp_path / name, *more, seed, gpus="--gpus=2", plans="1") for name, seed in seeds.items()]
    for one in told:
        del one["solver"]["seconds"]
    assert told[0] == told[1]
    assert told[0]["simulated"] != told[2]["simulated"]
    assert told[0]["workers"] == told[2]["workers"]


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--gpu-types", "h100:4"], "--gpus N, or --gpu-types"),
        (["--target", "1"], "--target must be between 0 and 1, got 1"),
        (["--target", "1.5"], "got 1.5"),
        (["--itl-slo", "0.001"], "an ITL of 0.001 s cannot be kept.*--itl-slo to 0.0"),
        (["--ttft-slo", "0.01"], "a TTFT of 0.01 s cannot be kept.*--ttft-slo to 0.0"),
        (["--objective", "min-gpus", "--rate", "10000"], "4 h100 cannot serve 10000 sessions/s.*a rate of at most"),
        (["--objective", "min-p95", "--rate", "1e9"], "at most 1e[+]06 sessions/s, got 1e[+]09"),
        (["--profile", "no-such"], "h100-qwen3-32b"),
        (["--trace", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_wrong_requests_say_which_number(trace: Path, tmp_path: Path, more: list[str], named: str) -> None:
    with pytest.raises(AmpdError, match=named) as caught:
        plan(trace, tmp_path / "out", *more)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("types", "named"),
    [
        ("h100", "'h100'"),
        ("h100:0", "'h100:0'"),
        ("h100:x", "'h100:x'"),
        ("h100:2,h100:2", "each type once"),
        (":3", "':3'"),
        ("h100:2,", "''"),
        ("b200:4", "b200-qwen3-32b"),
        ("h100:2,h20:70000", "h20 must be 1 to 65536, got 70000"),
    ],
)
def test_wrong_types_of_gpus_say_what_to_write(trace: Path, tmp_path: Path, types: str, named: str) -> None:
    with pytest.raises(AmpdError, match=re.escape(named)) as caught:
        plan(trace, tmp_path, gpus=f"--gpu-types={types}")
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_fewer_gpus_than_the_model_needs(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(AmpdError, match=r"1 h100: the smallest worker .* has 4 GPUs \(h100 x 4\): give at least 4"):
        plan(trace, tmp_path, "--profile", "h100-llama-3.1-70b", gpus="--gpus=1")


def test_an_inconsistent_profile_and_an_empty_trace_are_refused(trace: Path, tmp_path: Path) -> None:
    profile = tmp_path / "toy-odd.json"
    profile.write_bytes(msgspec.json.encode(make_profile("toy-odd", kv_tokens={2: 50_000, 3: 90_000})))
    with pytest.raises(AmpdError, match="parallel degree of 3 is no multiple of 2"):
        plan(trace, tmp_path / "out", "--profile", str(profile))
    text = profile.read_text().replace('"num_kv_tokens":50000', '"num_kv_tokens":0')
    profile.with_name("toy-none.json").write_text(text)
    with pytest.raises(AmpdError, match="num_kv_tokens"):
        plan(trace, tmp_path / "out", "--profile", str(profile.with_name("toy-none.json")))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for more in ([], ["--format", "ampd"]):
        with pytest.raises(AmpdError, match=r"empty\.jsonl (is empty|has no session)"):
            plan(empty, tmp_path / "out", *more)


def test_a_trace_that_does_not_know_its_arrivals_needs_a_rate(tmp_path: Path) -> None:
    path = write_sessions(tmp_path / "unknown.jsonl", float, known=False)
    with pytest.raises(AmpdError, match="--objective min-gpus needs --rate"):
        plan(path, tmp_path / "out", "--objective", "min-gpus")
    assert plan(path, tmp_path / "out", "--objective", "min-gpus", "--rate", "2")["num_gpus"] >= 1
    assert plan(path, tmp_path / "out")["workload"]["burstiness"] == 1.0


def test_a_folder_that_cannot_be_made_is_refused_before_anything_takes_long(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AmpdError, match="give another --out"):
        plan(Path("missing"), tmp_path / "file")


def test_the_ampd_command_ends_with_2(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags_for(trace, tmp_path, "--itl-slo", "0.001")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ampd: an ITL of 0.001 s cannot be kept")
    with pytest.raises(SystemExit) as leaving:
        main(["plan", "--profile", PROFILE, "--gpus", "0"])
    assert leaving.value.code == 2


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    assert "example:" in capsys.readouterr().out


def test_adding_the_command_imports_nothing_heavy() -> None:
    code = (
        "import argparse, sys; from planner.planning.plan_command import add_plan_command;"
        "add_plan_command(argparse.ArgumentParser().add_subparsers());"
        "heavy = {'torch', 'nats', 'rich', 'msgspec', 'numpy', 'matplotlib', 'highspy'} & set(sys.modules);"
        "sys.exit(' '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
