"""A running worker takes another role. Nothing that it does is stopped, and nothing moves at once:

    ChangeRole -> SetRole to the worker -> Ack -> RoleChanged; its heartbeats tell the new role from then on

Nothing new is routed by the old role from the request on, although late heartbeats still tell it. What was commanded
before goes on at the worker, which carries out every command whatever its role: only here does a role mean anything.
Sessions bound to a worker that no longer decodes leave it with their next round (placement.py, leaving.py).

The change ends with the first heartbeat that tells the new role. One that the worker refuses or does not answer, or
that no heartbeat tells of in time, is given up: then the worker's role is what its heartbeats say.
"""

from __future__ import annotations

from shared.core.commands import Reply
from shared.core.events import RoleRequested
from shared.core.fleet import RoleChange, WorkerState
from shared.core.state import State
from shared.core.types import NO_SESSION
from shared.errors import AmpdError, ErrorCode
from shared.messages import ChangeRole, ErrorReply, Role, RoleChanged, SetRole


def on_role_requested(state: State, event: RoleRequested) -> None:
    try:
        _change_role(state, event.request_id, event.request)
    except AmpdError as error:
        state.refuse(event.request_id, error.code, error.message, retry_after_s=error.retry_after_s)


def _change_role(state: State, request_id: int, request: ChangeRole) -> None:
    """Answer, or begin the change that the answer waits for. Raises AmpdError that says what to change."""
    worker = _find_worker(state, request.worker_id)
    change, role = worker.change, request.role
    if change is not None and change.role == role:
        _join(state, worker, change, request_id)
        return
    if change is not None:
        raise AmpdError(
            ErrorCode.ROLE_CHANGING,
            f"{worker.worker_id} is taking the role {change.role}: ask again when it has it",
            retry_after_s=1.0,
        )
    if worker.load.role == role:
        _reply(state, request_id, worker, role, role)
        return
    if worker.heartbeat.draining:
        raise AmpdError(ErrorCode.DRAINING, f"{worker.worker_id} is stopping: choose another worker")
    if role == "prefill":
        _check_others_decode(state, worker)
    until = state.now + state.config.role_change_patience_s
    worker.change = RoleChange(role, worker.load.role, until, waiting=[request_id])
    worker.load.role = role
    state.counters["role_changes"] += 1
    state.send(worker, NO_SESSION, SetRole(incarnation=worker.incarnation, role=role))


def _find_worker(state: State, worker_id: str) -> WorkerState:
    worker = state.fleet.workers.get(worker_id)
    if worker is None:
        known = ", ".join(sorted(w.worker_id for w in state.fleet.workers.values() if w.alive)) or "none"
        raise AmpdError(ErrorCode.INVALID_REQUEST, f"there is no worker {worker_id[:128]!r}: choose one of {known}")
    if not worker.alive:
        raise AmpdError(ErrorCode.WORKER_LOST, f"worker {worker_id} is lost: choose another, or start it again")
    return worker


def _check_others_decode(state: State, worker: WorkerState) -> None:
    """A worker that is about to become one that decodes counts when it has told so: it may not take the role."""
    model = worker.heartbeat.model
    others = [w for w in state.fleet.list_decode(model, state.now) if w is not worker and w.heartbeat.role != "prefill"]
    if worker.load.takes_decode and not others:
        raise AmpdError(
            ErrorCode.NO_DECODE_WORKER,
            f"no other worker of model {model} decodes: give another the role decode or both first, and wait until "
            "`ampd status` shows it",
        )


def _join(state: State, worker: WorkerState, change: RoleChange, request_id: int) -> None:
    """The same change is under way: its outcome is the answer."""
    if change.is_acknowledged:
        _reply(state, request_id, worker, change.role, change.previous)
    elif len(change.waiting) >= state.config.max_role_waiters:
        message = f"{len(change.waiting)} requests wait for {worker.worker_id} to take this role: ask again later"
        raise AmpdError(ErrorCode.OVERLOADED, message, retry_after_s=1.0)
    else:
        change.waiting.append(request_id)


# ----------------------------------------------------------------------------------- outcome


def is_changing(worker: WorkerState, message: SetRole) -> bool:
    """The change that a command was sent for is still under way."""
    return worker.change is not None and worker.change.role == message.role


def note_role_set(state: State, worker: WorkerState, message: SetRole) -> None:
    """The worker has taken the role; a heartbeat that was sent before may still be on its way."""
    change = worker.change
    if change is None or not is_changing(worker, message):
        return
    change.is_acknowledged = True
    _answer_waiting(state, worker, change)


def note_role(state: State, worker: WorkerState) -> None:
    """A heartbeat has come: if it tells the new role, the change is over."""
    change = worker.change
    if change is not None and worker.heartbeat.role == change.role:
        _answer_waiting(state, worker, change)
        worker.change = None


def note_role_failed(state: State, worker: WorkerState, message: SetRole, error: ErrorReply) -> None:
    """The worker refuses the role, or cannot be reached."""
    if worker.change is not None and is_changing(worker, message):
        _give_up(state, worker, worker.change, error)


def give_up_unheard(state: State) -> None:
    """Changes that no heartbeat has told of for too long."""
    for worker in state.fleet.workers.values():
        if worker.change is not None and state.now >= worker.change.until:
            message = f"worker {worker.worker_id} has not taken the role {worker.change.role}: look at its log"
            _give_up(state, worker, worker.change, ErrorReply(code=ErrorCode.WORKER_LOST, message=message))


def _give_up(state: State, worker: WorkerState, change: RoleChange, error: ErrorReply) -> None:
    worker.change = None
    worker.load.role = worker.heartbeat.role
    state.counters["role_changes_given_up"] += 1
    for request_id in change.waiting:
        state.refuse(request_id, error.code, error.message)


def _answer_waiting(state: State, worker: WorkerState, change: RoleChange) -> None:
    waiting, change.waiting = change.waiting, []
    for request_id in waiting:
        _reply(state, request_id, worker, change.role, change.previous)


def _reply(state: State, request_id: int, worker: WorkerState, role: Role, previous: Role) -> None:
    reply = RoleChanged(worker_id=worker.worker_id, role=role, previous=previous)
    state.emit(Reply(request_id=request_id, message=reply))
