"""`ampd explain`: why each round of a session was prefilled where it was, predicted against measured."""

from __future__ import annotations

from typing import Any

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.connect import connect_to_cluster
from shared.messages import OptionExplained, RoundExplained, SessionExplained

ANSWER_TIMEOUT_S = 5.0


async def show_explanation(url: str, *, tenant: str, session: str, as_json: bool, console: Console) -> int:
    """Raises AmpdError when nothing answers at `url`, or UNKNOWN_SESSION."""
    async with await connect_to_cluster(url, name="ampd-explain", tenant=tenant) as client:
        explained = await client.explain(session, timeout_s=ANSWER_TIMEOUT_S)
    if as_json:
        answer = explanation_for_programs(explained)
        console.file.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
    else:
        console.print(Group(*describe_explanation(explained)))
    return 0


def explanation_for_programs(explained: SessionExplained) -> dict[str, Any]:
    """The coordinator's answer; each round also says whether it `moves_session`."""
    answer: dict[str, Any] = msgspec.to_builtins(explained)
    for line, one in zip(answer["rounds"], explained.rounds, strict=True):
        line["moves_session"] = one.moves_session
    return answer


def describe_explanation(explained: SessionExplained) -> list[RenderableType]:
    """One block for each round, the oldest first."""
    parts: list[RenderableType] = [
        Text(f"session {explained.session}, policy {explained.policy}: {len(explained.rounds)} rounds explained")
    ]
    for one in explained.rounds:
        parts.extend(_describe_round(one))
    return parts


def _describe_round(one: RoundExplained) -> list[RenderableType]:
    attempt = f", attempt {one.attempt}" if one.attempt > 1 else ""
    head = Text(f"\nround {one.round}{attempt}: {one.placement} on {one.worker_id}", style="bold")
    if one.moves_session:
        source = f" from {one.usage.moved_from}" if one.usage is not None and one.usage.moved_from else ""
        head.append(f", moves the session to {one.worker_id}{source}")
    head.append(f", {one.reason}", style="not bold")
    parts: list[RenderableType] = [head]
    if one.options:
        parts.append(_option_table(one))
    if 0 <= one.chosen_index < len(one.options):
        parts.append(_measured_table(one, one.options[one.chosen_index]))
    elif one.usage is not None:
        parts.append(_measured_table(one, None))
    return parts


def _option_table(one: RoundExplained) -> Table:
    """What was predicted of every option, in milliseconds; the chosen one is marked."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("")
    table.add_column("option", overflow="fold", min_width=10)
    for column in ("compute\ntokens", "move\ntokens", "queue\nms", "KV\nms", "prefill\nms", "first\ntoken ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("on\ntime", "dis-\nturbed"):
        table.add_column(column, justify="right", no_wrap=True)
    for index, option in enumerate(one.options):
        is_chosen = index == one.chosen_index
        table.add_row(
            "*" if is_chosen else "",
            f"{option.placement} {option.worker_id}",
            str(option.num_new_tokens),
            str(option.num_moved_tokens),
            _milliseconds(option.queue_s),
            _milliseconds(option.transfer_s),
            _milliseconds(option.prefill_s),
            _milliseconds(_total_s(option)),
            f"{option.on_time:.0%}",
            f"{option.disturbed:.2f}",
            style="bold" if is_chosen else None,
        )
    return table


def _measured_table(one: RoundExplained, chosen: OptionExplained | None) -> Table:
    """The chosen option's prediction against what came of it, and against the objectives."""
    predicted: tuple[float | None, ...] = (None, None, None, None)
    if chosen is not None:
        predicted = (chosen.queue_s, chosen.transfer_s, chosen.prefill_s, _total_s(chosen))
    measured: tuple[float | None, ...] = (None, None, None)
    if one.usage is not None:
        measured = (one.usage.queued_s, one.usage.transfer_s, one.usage.prefill_s)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("ms", "predicted", "measured", "objective"):
        table.add_column(column, justify="left" if column == "ms" else "right", no_wrap=True)
    for name, predicted_s, measured_s, objective_s in zip(
        ("queue", "KV transfer", "prefill", "first token", "per output token"),
        (*predicted, None),
        (*measured, one.ttft_s, one.tpot_s),
        (None, None, None, one.slo.ttft_s, one.slo.itl_s),
        strict=True,
    ):
        is_late = measured_s is not None and objective_s is not None and measured_s > objective_s
        table.add_row(
            name,
            _milliseconds(predicted_s),
            _milliseconds(measured_s),
            _milliseconds(objective_s),
            style="red" if is_late else None,
        )
    return table


def _total_s(option: OptionExplained) -> float:
    return option.queue_s + option.transfer_s + option.prefill_s


def _milliseconds(duration_s: float | None) -> str:
    return "-" if duration_s is None else f"{duration_s * 1e3:.1f}"
