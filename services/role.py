"""`ampd role`: have a running worker take another role."""

from __future__ import annotations

import msgspec
from rich.console import Console

from services.connect import connect_to_cluster
from shared.messages import Role

ANSWER_TIMEOUT_S = 15.0  # more than the coordinator's patience with the worker


async def change_role(url: str, *, worker_id: str, role: Role, as_json: bool, console: Console) -> int:
    """Raises AmpdError when nothing answers at `url`, or the coordinator's refusal, which says what to change."""
    async with await connect_to_cluster(url, name="ampd-role") as client:
        changed = await client.change_role(worker_id, role, timeout_s=ANSWER_TIMEOUT_S)
    if as_json:
        console.file.write(msgspec.json.format(msgspec.json.encode(changed), indent=2).decode() + "\n")
    elif changed.previous == changed.role:
        console.print(f"{changed.worker_id} has the role {changed.role} already", highlight=False)
    else:
        console.print(f"{changed.worker_id}: {changed.previous} -> {changed.role}", highlight=False)
    return 0
