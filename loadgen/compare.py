"""The same sessions and arrivals under several policies: the runs, their numbers, and compare.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from loadgen.contenders import Contender
from loadgen.records import RoundRecord, RunInfo, read_records, read_run
from loadgen.report import Report
from loadgen.run import ROUNDS, RUN, describe_machine, make_folder, write_report, write_run
from loadgen.traces import TraceSession
from loadgen.workload import Workload, choose_workload
from shared.errors import AmpdError, ErrorCode
from shared.messages import Slo

SCHEMA = "ampd-compare/1"
COMPARE, RUNS = "compare.json", "runs"
TARGET = 0.9  # goodput: the share of rounds that must attain

Comparison = dict[str, Any]  # the content of compare.json
# Makes one run of the chosen sessions, in profile seconds; may write into the folder. Raises AmpdError.
Runner = Callable[[Contender, Workload, list[TraceSession], Path], tuple[RunInfo, list[RoundRecord]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """`workload` stands for all of them: each run has its own rate and seed."""

    kind: Literal["live", "simulated"]
    contenders: Sequence[Contender]
    workload: Workload
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    slo: Slo
    warm_up: float = 0.0

    def workloads(self) -> Iterator[Workload]:
        for rate in self.rates:
            for seed in self.seeds:
                yield replace(self.workload, rate=rate, seed=seed)


def compare_policies(
    config: CompareConfig,
    trace: Sequence[TraceSession],
    run: Runner,
    out: Path,
    on_run: Callable[[Contender, Workload], None],
) -> Comparison:
    """Make every run, one policy after another; write compare.json and a folder a run.

    `on_run` is told of each before it starts. A run that cannot be made is noted in `failures`, the others go on.
    Raises AmpdError INVALID_REQUEST for what the caller must change.
    """
    make_folder(out / RUNS)
    runs: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for contender in config.contenders:
        for workload in config.workloads():
            on_run(contender, workload)
            which = {"policy": contender.policy, "rate": workload.rate, "seed": workload.seed}
            folder = out / RUNS / name_folder(contender.policy, workload.rate, workload.seed)
            make_folder(folder)
            try:
                info, records = run(contender, workload, choose_workload(trace, workload), folder)
            except AmpdError as error:
                if error.code is ErrorCode.INVALID_REQUEST:
                    raise
                failures.append({**which, "message": error.message})
                continue
            report = write_outcome(info, records, folder, with_rounds=workload.seed == config.seeds[0])
            runs.append({**which, "folder": f"{RUNS}/{folder.name}", **describe_outcome(report)})
    comparison = {
        "schema": SCHEMA,
        "kind": config.kind,
        "slo": {"ttft_slo_s": config.slo.ttft_s, "itl_slo_s": config.slo.itl_s},
        "workload": {
            **asdict(config.workload),
            "file": Path(config.workload.file).name,
            "rate": list(config.rates),
            "seed": list(config.seeds),
            "warm_up": config.warm_up,
        },
        "contenders": [contender.as_dict() for contender in config.contenders],
        "goodput": {one.policy: find_goodput(runs, one.policy) for one in config.contenders},
        "cells": summarise_cells(runs),
        "runs": runs,
        "failures": failures,
        "machine": describe_machine(),
    }
    (out / COMPARE).write_bytes(msgspec.json.format(msgspec.json.encode(comparison), indent=2) + b"\n")
    return comparison


def name_folder(policy: str, rate: float, seed: int) -> str:
    return f"{policy}-rate-{rate:g}-seed-{seed}"


def write_outcome(run: RunInfo, records: Sequence[RoundRecord], folder: Path, *, with_rounds: bool) -> Report:
    """Live runs are kept whole. Of simulated ones, which can be made again, the rounds of the first seed are kept."""
    if with_rounds or run.kind == "live":
        write_run(run, records, folder)
    return write_report(run, records, folder, with_plot=run.kind == "live")


def read_outcome(out: Path, run: dict[str, Any]) -> tuple[RunInfo, list[RoundRecord]]:
    """The rounds behind one of compare.json's `runs`, of the first seed."""
    return read_run(out / run["folder"] / RUN), read_records(out / run["folder"] / ROUNDS)


# ---------------------------------------------------------------------------------------- numbers


def describe_outcome(report: Report) -> dict[str, Any]:
    return {
        "numbers": extract_numbers(report),
        "errors": report["errors"],
        "trace": report["trace"],
        **({"simulation": report["simulation"]} if "simulation" in report else {}),
    }


def extract_numbers(report: Report) -> dict[str, float | int | None]:
    """Everything that is compared, by name; seconds and rates are those of the profile."""
    rounds, slo, kv = report["rounds"], report["slo"], report["kv"]
    numbers: dict[str, float | int | None] = {
        "rounds_offered": rounds["offered"],
        "rounds_completed": rounds["completed"],
        "attainment": slo["attainment"],
        "p99_itl_attainment": slo["p99_itl_attainment"],
        "ttft_attainment": slo["ttft_attainment"],
        "session_attainment": slo["session_attainment"],
        "local_share": report["prefill"]["local_share"],
        "kv_bytes_moved": kv["bytes_moved"],
        "kv_bytes_per_round": round(kv["bytes_moved"] / rounds["completed"], 1) if rounds["completed"] else None,
        "preemptions": report["tokens"]["preemptions"],
        "lag_p99_s": report["lag_s"]["p99"],
        "rounds_per_s": report["throughput"]["rounds_per_s"],
        "output_tokens_per_s": report["throughput"]["output_tokens_per_s"],
    }
    for name in ("ttft", "itl", "tpot", "round"):
        for column in ("mean", "p50", "p90", "p99", "max"):
            numbers[f"{name}_{column}_s"] = report[f"{name}_s"][column]
    return numbers


def summarise_cells(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds, for every policy and rate: sd is of the sample, null for a single run."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        cells.setdefault((run["policy"], run["rate"]), []).append(run["numbers"])
    return [
        {
            "policy": policy,
            "rate": rate,
            "num_runs": len(numbers),
            "numbers": {name: _spread([one[name] for one in numbers]) for name in numbers[0]},
        }
        for (policy, rate), numbers in cells.items()
    ]


def _spread(values: Sequence[float | int | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "sd": None, "min": None, "max": None}
    return {
        "mean": round(statistics.fmean(known), 6),
        "sd": round(statistics.stdev(known), 6) if len(known) > 1 else None,
        "min": min(known),
        "max": max(known),
    }


def find_goodput(runs: Sequence[dict[str, Any]], policy: str) -> float | None:
    """The highest rate tried with a mean attainment of TARGET or more, None if there is none."""
    cells = [cell for cell in summarise_cells(runs) if cell["policy"] == policy]
    rates = [cell["rate"] for cell in cells if (cell["numbers"]["attainment"]["mean"] or 0.0) >= TARGET]
    return max(rates, default=None)
