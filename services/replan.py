"""`ampd replan`: what the planner proposes, and what becomes of it."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from services.connect import connect_to_cluster
from shared.messages import ReplanMode, ReplanState

ANSWER_TIMEOUT_S = 5.0


async def replan(url: str, *, mode: ReplanMode | None, as_json: bool, console: Console) -> int:
    """Raises AmpdError when nothing answers at `url`."""
    async with await connect_to_cluster(url, name="ampd-replan") as client:
        state = await client.replan(mode, timeout_s=ANSWER_TIMEOUT_S)
    if as_json:
        console.file.write(msgspec.json.format(msgspec.json.encode(state), indent=2).decode() + "\n")
    else:
        print_state(state, console)
    return 0


def print_state(state: ReplanState, console: Console) -> None:
    console.print(f"mode {state.mode}, {state.num_changed} roles changed so far: {state.reason}", highlight=False)
    if state.load:
        console.print(
            f"load {state.load:.0%}: {state.sessions_per_s:.3g} sessions/s of {state.capacity_sessions_per_s:.3g}, "
            f"{state.proposed_sessions_per_s:.3g} with the changes",
            highlight=False,
        )
    if state.changes:
        table = Table("worker", "role", "KV to hand on, s", "outcome")
        for change in state.changes:
            table.add_row(change.worker_id, change.role, f"{change.cost_s:.3g}", change.outcome or "proposed")
        console.print(table)
    if state.replicas:
        table = Table("profile", "GPUs", "role", "running", "wanted")
        for one in state.replicas:
            table.add_row(one.profile, str(one.parallel_degree), one.role, str(one.running), str(one.wanted))
        console.print(table)
