"""How much of a remote prefill's KV transfers is hidden behind compute, and that no byte moves twice.

A live cluster of one prefill and one decode worker. Sessions begin with a round on the decode worker; then each sends
rounds whose prefill is remote, and which queue at the prefill worker: a history is read while the prefill before is
computed, an increment goes layer by layer while its own is. The first two such rounds of each session are warm-up.
`alone` has one session: nothing is there to hide a history behind. The bytes of every round are compared with the KV
of the tokens that the receiver lacked.

With --check the exit status is 1 when less than 90 % is hidden (queued), or a byte too many was moved.

Example:
    python benchmarks/bench_overlap.py --out overlap.json --plot overlap.png
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is not installed

import services.local
from benchmarks.bench_output import describe_machine, read_commit
from benchmarks.overlap.intervals import Span, Transfer, find_exposed_s
from benchmarks.overlap.policy import REMOTE_LATER
from services.cluster_options import ClusterOptions
from services.local import LocalCluster
from shared.client import AmpdClient
from shared.core.policies import POLICIES
from shared.messages import StopConditions, Usage

RUN_SERVICE = Path(__file__).parent / "overlap" / "run_service.py"
HIDDEN_TARGET = 0.9
WARM_UP_ROUNDS = 2  # later rounds of each session in which the queue builds up
NUM_OUTPUT = 4
COLUMNS = [
    "case",
    "remote rounds",
    "lanes",
    "MB moved",
    "transfers",
    "exposed",
    "hidden",
    "history",
    "increment",
    "bytes exact",
]
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=int, default=1_024, help="tokens of first rounds (default %(default)s)")
    parser.add_argument("--new", type=int, default=512, help="tokens of later rounds (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="later rounds of a session (default %(default)s)")
    parser.add_argument("--sessions", type=int, default=4, help="of the queued case (default %(default)s)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv-transport", default="auto")
    parser.add_argument("--out", type=Path, help="write the report as JSON to this file")
    parser.add_argument("--plot", type=Path, help="draw the queued case's spans into this PNG")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    args = parser.parse_args()
    report: Row = {
        "benchmark": "kv_overlap",
        "commit": read_commit(),
        "machine": describe_machine(),
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "plot", "check")},
        "cases": {name: asyncio.run(run_case(args, count)) for name, count in cases(args)},
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    if args.plot:
        plot(report["cases"]["queued"], args.plot)
    show(report)
    queued = report["cases"]["queued"]
    exact = all(case["bytes_exact"] for case in report["cases"].values())
    return int(args.check and not (exact and queued["hidden_share"] >= HIDDEN_TARGET))


def cases(args: argparse.Namespace) -> list[tuple[str, int]]:
    return [("queued", args.sessions), ("alone", 1)]


async def run_case(args: argparse.Namespace, num_sessions: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        usages, bytes_per_token = await serve(args, num_sessions, Path(folder))
        computes, transfers = read_logs(Path(folder))
    later = [one for one in transfers if one.round > (WARM_UP_ROUNDS if num_sessions > 1 else 0)]
    exposed = [find_exposed_s(one, computes) for one in later]
    total_s = sum(one.active_s for one in later)
    return {
        "num_sessions": num_sessions,
        "lanes": sorted({one.lane for one in later}),
        "num_remote": sum(usage.prefill == "remote" for usage in usages.values()),
        "transfer_s": total_s,
        "exposed_s": sum(exposed),
        "hidden_share": 1.0 - sum(exposed) / total_s,
        "hidden_share_of": {purpose: hidden_share(later, exposed, purpose) for purpose in ("history", "increment")},
        "bytes_exact": all(is_exact(usage, bytes_per_token) for (_, index), usage in usages.items() if index),
        "num_bytes": sum(one.num_bytes for one in later),
        "computes": [asdict(one) for one in computes],
        "transfers": [{**asdict(one), "exposed_s": s} for one, s in zip(later, exposed, strict=True)],
    }


def hidden_share(transfers: list[Transfer], exposed: list[float], purpose: str) -> float:
    pairs = [(one.active_s, s) for one, s in zip(transfers, exposed, strict=True) if one.purpose == purpose]
    return 1.0 - sum(s for _, s in pairs) / sum(active_s for active_s, _ in pairs)


def is_exact(usage: Usage, bytes_per_token: int) -> bool:
    """The prefill worker keeps nothing, so it lacks the history that the decode worker has; that lacks the rest."""
    history = usage.num_cached_tokens
    increment = usage.num_history_tokens + usage.num_input_tokens - history
    return (usage.kv_bytes_read, usage.kv_bytes_written) == (history * bytes_per_token, increment * bytes_per_token)


async def serve(args: argparse.Namespace, num_sessions: int, folder: Path) -> tuple[dict[tuple[int, int], Usage], int]:
    """The usage of every round, and the KV bytes of a token."""
    os.environ.update(AMPD_LOG_LEVEL="debug", AMPD_LOG_FORMAT="json")
    POLICIES[REMOTE_LATER.name] = REMOTE_LATER
    start = services.local.ServiceProcess
    services.local.ServiceProcess = (
        lambda name, argv, *rest: start(  # type: ignore[assignment, misc]
            name, [sys.executable, str(RUN_SERVICE), *argv[2:]], *rest
        )
    )
    options = ClusterOptions(
        model=args.model, dtype="float32", policy=REMOTE_LATER.name, log_dir=folder, kv_transport=args.kv_transport
    )
    local = LocalCluster(options, lambda report: print(report, file=sys.stderr))
    usages: dict[tuple[int, int], Usage] = {}
    try:
        await local.start()
        client = await AmpdClient.connect(local.url)
        status = await client.status()

        async def play(number: int) -> None:
            async with await client.open_session(f"s{number}") as session:
                for index in range(args.rounds + 1):
                    count = args.new if index else args.history
                    tokens = [(7919 * number + 104_729 * index + 31 * i) % 40_000 + 10 for i in range(count)]
                    stop = StopConditions(max_output_tokens=NUM_OUTPUT, ignore_eos=True)
                    result = await (await session.submit(tokens, stop=stop, deadline_s=600.0)).result()
                    assert result.usage is not None
                    usages[number, index] = result.usage

        await asyncio.gather(*(play(number) for number in range(num_sessions)))
        await client.close()
        return usages, status.workers[0].heartbeat.kv_bytes_per_token
    finally:
        await local.stop(asyncio.Event())
        services.local.ServiceProcess = start  # type: ignore[misc]


def read_logs(folder: Path) -> tuple[list[Span], list[Transfer]]:
    """Computes of the prefill worker, and transfers between the two."""
    computes: list[Span] = []
    transfers: list[Transfer] = []
    for path in sorted(folder.glob("*-0.log")):
        for line in path.read_text().splitlines():
            event = json.loads(line) if line.startswith("{") else {}
            match event.get("event"):
                case "prefilled":
                    computes.append(Span(event["session"], event["round"], event["start_s"], event["end_s"]))
                case "kv_pulled":
                    transfer = Transfer(
                        event["session"],
                        event["round"],
                        event["end_s"] - event["wall_s"],
                        event["end_s"],
                        event["purpose"],
                        event["wall_s"] - event["waiting_s"],
                        event["num_bytes"],
                        event["lane"],
                    )
                    transfers.append(transfer)
    return computes, transfers


def show(report: Row) -> None:
    table = Table(title="KV transfers of remote prefills behind compute")
    for column in COLUMNS:
        table.add_column(column)
    for name, case in report["cases"].items():
        of = case["hidden_share_of"]
        table.add_row(
            name, str(case["num_remote"]), ", ".join(case["lanes"]), f"{case['num_bytes'] / 1e6:.0f}",
            f"{1e3 * case['transfer_s']:.0f} ms", f"{1e3 * case['exposed_s']:.1f} ms", f"{case['hidden_share']:.1%}",
            f"{of['history']:.1%}", f"{of['increment']:.1%}", str(case["bytes_exact"]),
        )  # fmt: skip
    Console(width=150).print(table)


def plot(case: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    spans = [*case["computes"], *case["transfers"]]
    began = min(one["start_s"] for one in spans)
    keys = sorted({(one["session"], one["round"]) for one in case["transfers"]}, key=lambda key: min(
        one["start_s"] for one in spans if (one["session"], one["round"]) == key))  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(11, 0.45 * len(keys) + 1.5))
    colours = {"compute": "#9ecae1", "history": "#e6550d", "increment": "#31a354"}
    for row, key in enumerate(keys):
        for one in spans:
            if (one["session"], one["round"]) != key:
                continue
            kind = one.get("purpose", "compute")
            height, shift = (0.8, 0.0) if kind == "compute" else (0.3, 0.2 if kind == "history" else -0.2)
            axes.barh(row + shift, one["end_s"] - one["start_s"], left=one["start_s"] - began, height=height,
                      color=colours[kind], zorder=1 if kind == "compute" else 2)  # fmt: skip
    axes.set_yticks(range(len(keys)), [f"{session} round {index}" for session, index in keys])
    axes.set_xlabel("seconds")
    axes.set_title(f"Remote prefills on one worker: {case['hidden_share']:.1%} of KV's time is hidden behind compute")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axes.legend(handles, ["prefill", "history is read", "increment is pulled, layer by layer"], loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
