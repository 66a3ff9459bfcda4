"""The only place where a subject string is built or taken apart.

Client subjects:   ampd.v1.<tenant>.session.<session>.request   (request; JSON or MessagePack)
                   ampd.v1.<tenant>.stream.<session>.<round>    (publish; one subject per round)
Admin subjects:    ampd.admin.v1.status | explain | role | stats | replan  (request)
Internal subjects: ampd.sys.v1.worker.<worker_id>.command       (request, acknowledged)
                   ampd.sys.v1.worker.<worker_id>.peer          (request between workers: KV control)
                   ampd.sys.v1.heartbeat.<worker_id>            (publish)
                   ampd.sys.v1.coordinator.event                (request, acknowledged)
                   ampd.sys.v1.observed.round                   (publish: one line per ended round, for the planner)
                   ampd.sys.v1.planner.proposal                 (publish: every proposal, with wanted replicas)
                   ampd.sys.v1.record.<tenant>.<session>        (JetStream: the session's durable record)
"""

from __future__ import annotations

import re

from shared.errors import AmpdError, ErrorCode

_TOKEN = re.compile(r"[A-Za-z0-9_\-:/]{1,128}")

HEARTBEATS = "ampd.sys.v1.heartbeat.*"
ALL_STREAMS = "ampd.v1.*.stream.*.*"
ALL_SESSION_REQUESTS = "ampd.v1.*.session.*.request"
COORDINATOR_EVENT = "ampd.sys.v1.coordinator.event"
OBSERVED_ROUND = "ampd.sys.v1.observed.round"
STATUS = "ampd.admin.v1.status"
EXPLAIN = "ampd.admin.v1.explain"
ROLE = "ampd.admin.v1.role"
PLANNER_STATS = "ampd.admin.v1.stats"
REPLAN = "ampd.admin.v1.replan"
PLANNER_PROPOSAL = "ampd.sys.v1.planner.proposal"
RECORDS = "ampd.sys.v1.record.>"
RECORD_STREAM = "AMPD_SESSIONS"


def check_token(name: str, value: str) -> str:
    """Return `value` if it can be one token of a subject, else raise INVALID_REQUEST."""
    if not _TOKEN.fullmatch(value):
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"{name} must be 1 to 128 characters of letters, digits and _ - : / ; got {value[:40]!r}",
        )
    return value


def session_request(tenant: str, session: str) -> str:
    return f"ampd.v1.{check_token('tenant', tenant)}.session.{check_token('session', session)}.request"


def parse_session_request(subject: str) -> tuple[str, str]:
    """(tenant, session) of a session request subject."""
    _, _, tenant, _, session, _ = subject.split(".")
    return check_token("tenant", tenant), check_token("session", session)


def round_stream(tenant: str, session: str, round_index: int) -> str:
    return f"ampd.v1.{check_token('tenant', tenant)}.stream.{check_token('session', session)}.{round_index}"


def session_streams(tenant: str, session: str) -> str:
    """Wildcard over every round of one session: subscribe before sending the first round."""
    return f"ampd.v1.{check_token('tenant', tenant)}.stream.{check_token('session', session)}.*"


def parse_round_stream(subject: str) -> tuple[str, str, int]:
    """(tenant, session, round) of a stream subject."""
    _, _, tenant, _, session, round_index = subject.split(".")
    return tenant, session, int(round_index)


def worker_command(worker_id: str) -> str:
    return f"ampd.sys.v1.worker.{check_token('worker_id', worker_id)}.command"


def worker_peer(worker_id: str) -> str:
    return f"ampd.sys.v1.worker.{check_token('worker_id', worker_id)}.peer"


def heartbeat(worker_id: str) -> str:
    return f"ampd.sys.v1.heartbeat.{check_token('worker_id', worker_id)}"


def record(tenant: str, session: str) -> str:
    return f"ampd.sys.v1.record.{check_token('tenant', tenant)}.{check_token('session', session)}"


def parse_record(subject: str) -> tuple[str, str]:
    """(tenant, session) of a record subject."""
    *_, tenant, session = subject.split(".")
    return tenant, session
