"""`ampd status`: what the coordinator and the planner say, as tables for people or as JSON for programs."""

from __future__ import annotations

from typing import Any

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.connect import connect_to_cluster
from shared.messages import ClusterStatus, Heartbeat, PlannerStats, SessionStatus, WindowStats, WorkerStatus

ANSWER_TIMEOUT_S = 5.0
MAX_SESSION_ROWS = 40


async def show_status(url: str, *, as_json: bool, with_stats: bool, console: Console) -> int:
    """Raises AmpdError when nothing answers at `url`."""
    async with await connect_to_cluster(url, name="ampd-status") as client:
        status = await client.status(timeout_s=ANSWER_TIMEOUT_S)
        stats = await client.planner_stats(timeout_s=ANSWER_TIMEOUT_S) if with_stats else None
    if as_json:
        answer = {"status": status_for_programs(status), **({"stats": stats} if stats is not None else {})}
        console.file.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
    else:
        console.print(Group(*describe_status(status), *([describe_stats(stats)] if stats is not None else [])))
    return 0


def status_for_programs(status: ClusterStatus) -> dict[str, Any]:
    """The coordinator's answer; each worker also has `kv_blocks`: its blocks in use, evictable and free."""
    answer: dict[str, Any] = msgspec.to_builtins(status)
    for line, worker in zip(answer["workers"], status.workers, strict=True):
        line["kv_blocks"] = dict(zip(("used", "evictable", "free"), _count_blocks(worker.heartbeat), strict=True))
    return answer


def describe_status(status: ClusterStatus) -> list[RenderableType]:
    """The cluster's workers, then its sessions, the newest first."""
    alive = sum(worker.alive for worker in status.workers)
    head = Text(
        f"model {status.model}, policy {status.policy}: {alive} of {len(status.workers)} workers alive, "
        f"{status.num_sessions} sessions, {status.num_rounds_in_flight} rounds in flight"
    )
    parts: list[RenderableType] = [head, _worker_table(status.workers), *_describe_pulls(status.workers)]
    if status.sessions:
        parts.append(_session_table(status.sessions, status.num_sessions))
    if any(status.counters.values()):
        counted = sorted((name, count) for name, count in status.counters.items() if count)
        parts.append(Text("counters: " + ", ".join(f"{name} {count}" for name, count in counted), style="dim"))
    return parts


def _worker_table(workers: tuple[WorkerStatus, ...]) -> Table:
    table = _new_table(
        "workers (KV: used/evictable/free; TTFT and ITL: 95th percentile of the last seconds)",
        left=(("worker", 10), ("role", 7), ("state", 5)),
    )
    for column in ("KV\n%", "sess.", "run.", "queue/\ntokens", "TTFT\nms", "ITL\nms"):
        table.add_column(column, justify="right", no_wrap=True)
    for worker in sorted(workers, key=lambda worker: worker.heartbeat.worker_id):
        beat = worker.heartbeat
        state = "draining" if beat.draining else "alive"
        table.add_row(
            beat.worker_id,
            beat.role if worker.wanted_role is None else f"{beat.role} -> {worker.wanted_role}",
            state if worker.alive else f"lost {worker.last_seen_s:.0f} s",
            "/".join(f"{100 * num_blocks / max(beat.num_blocks, 1):.0f}" for num_blocks in _count_blocks(beat)),
            str(beat.num_sessions),
            str(beat.num_running),
            f"{beat.num_waiting}/{beat.queue_num_tokens}",
            _milliseconds(beat.ttft),
            _milliseconds(beat.itl),
            style=None if worker.alive else "red",
        )
    return table


def _describe_pulls(workers: tuple[WorkerStatus, ...]) -> list[Text]:
    """Which way KV has come to each worker; for nixl with the lanes that its UCX has chosen."""
    pulled = [
        f"{worker.heartbeat.worker_id} {num_bytes / 1e6:.1f} MB by {lane}"
        for worker in sorted(workers, key=lambda worker: worker.heartbeat.worker_id)
        for lane, num_bytes in sorted(worker.heartbeat.kv_pulled.items())
    ]
    return [Text("KV pulled: " + ", ".join(pulled), style="dim")] if pulled else []


def _count_blocks(beat: Heartbeat) -> tuple[int, int, int]:
    """(in use, evictable, free)."""
    in_use = beat.num_blocks - beat.num_evictable_blocks - beat.num_free_blocks
    return in_use, beat.num_evictable_blocks, beat.num_free_blocks


def _session_table(sessions: tuple[SessionStatus, ...], num_sessions: int) -> Table:
    shown = sessions[:MAX_SESSION_ROWS]
    title = "sessions" if len(shown) == num_sessions else f"sessions ({len(shown)} of {num_sessions})"
    table = _new_table(title, left=(("tenant", 7), ("session", 12), ("state", 7), ("decode worker", 13)))
    for column in ("rounds", "tokens", "idle s"):
        table.add_column(column, justify="right")
    for session in shown:
        table.add_row(
            session.tenant,
            session.session,
            session.state,
            session.decode_worker or "-",
            str(session.num_rounds),
            str(session.num_tokens),
            f"{session.idle_s:.1f}",
        )
    return table


def _new_table(title: str, left: tuple[tuple[str, int], ...]) -> Table:
    """`left`: columns of names with their least width. A narrow terminal folds long names, and loses nothing."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for column, min_width in left:
        table.add_column(column, overflow="fold", min_width=min_width)
    return table


def describe_stats(stats: PlannerStats) -> Table:
    """What the planner has collected: totals, then windows."""
    table = Table(title="planner statistics", title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column()
    table.add_column(justify="right")
    attained = f"{stats.num_attained / stats.num_rounds:.1%}" if stats.num_rounds else "-"
    for name, value in (
        ("rounds (failed)", f"{stats.num_rounds} ({stats.num_failed})"),
        ("SLO attainment", attained),
        ("prefills local / remote", f"{stats.num_local} / {stats.num_remote}"),
        ("KV moved", f"{stats.kv_bytes_moved / 2**20:.1f} MiB"),
        ("rounds/s", f"{stats.rounds_per_s:.2f}"),
        ("TTFT mean / p95 ms", _mean_and_p95(stats.ttft_s, 1e3)),
        ("TPOT mean / p95 ms", _mean_and_p95(stats.tpot_s, 1e3)),
        ("input tokens mean / p95", _mean_and_p95(stats.input_tokens)),
        ("output tokens mean / p95", _mean_and_p95(stats.output_tokens)),
        ("delay mean / p95 s", _mean_and_p95(stats.delay_s)),
    ):
        table.add_row(name, value)
    return table


def _mean_and_p95(window: WindowStats, scale: float = 1.0) -> str:
    return f"{window.mean * scale:.1f} / {window.p95 * scale:.1f}" if window.count else "-"


def _milliseconds(window: WindowStats) -> str:
    return f"{window.p95 * 1e3:.1f}" if window.count else "-"
