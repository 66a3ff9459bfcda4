"""A session moves to another decode worker, and its KV after it.

    the attempt is recorded at the new worker -> GrantHistory to the old one -> RunRound{source} to the new one, which
    pulls the KV and prefills -> its first token -> DropSession to the old one

Nothing depends on the KV: without a grant, or when the pull fails, the new worker computes it. The old worker keeps it
until the first token, so that a move whose attempt fails before can be undone. After a restart the record knows the
new worker alone: the old one is told to drop the session as any worker that it has left.
"""

from __future__ import annotations

from shared.core.session import Move, RoundInFlight, Session
from shared.core.state import State
from shared.messages import GrantHistory


def ask_for_history(state: State, session: Session, move: Move) -> None:
    """Have the worker that the session leaves lend its KV; its answer, or its silence, settles the move."""
    source = state.fleet.find(move.source)
    if source is None:
        move.is_settled = True
        return
    move.grant_id = state.send(
        source,
        session.key,
        GrantHistory(
            tenant=session.key.tenant,
            session=session.key.session,
            incarnation=source.incarnation,
            num_tokens=session.num_tokens,
            hold=True,
        ),
        state.config.move_grant_timeout_s,
    )


def end_move(state: State, session: Session, running: RoundInFlight) -> None:
    """The session lives at the new worker now: the old one drops it."""
    move, running.move = running.move, None
    if move is not None:
        state.drop_at(move.source, session.key)


def undo_move(state: State, session: Session, running: RoundInFlight) -> None:
    """The attempt came to nothing before its first token: the session is back where its KV is, if that still lives."""
    move, running.move = running.move, None
    if move is None:
        return
    source = state.fleet.find(move.source)
    if source is None:
        state.drop_at(move.source, session.key)
        return
    state.unbind(session)
    state.bind(session, source, move.num_known_tokens)
    session.held = move.held
    state.counters["moves_undone"] += 1
