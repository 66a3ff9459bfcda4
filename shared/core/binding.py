"""Which decode worker a session is bound to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from shared.core.load import WorkerLoad

BindingName = Literal["free_kv", "least_loaded", "least_active"]
STEP_OF_A_FULL_BATCH_S = 0.05
SAME_SPEED = 1.2  # measured speeds this close are the same: running means of a few steps differ by less for no reason


def choose_binding(candidates: Iterable[WorkerLoad], binding: BindingName, now: float) -> WorkerLoad | None:
    """free_kv: the most free KV memory, what is promised there counted as used (the paper's). least_loaded: the least
    of KV promised, prefill work waiting and sequences decoding together. least_active: as that, but the KV of rounds in
    flight counts, and what idle sessions hold only a little (it can go to another tier); and all that are in flight
    count as decoding: who is prefilled elsewhere comes. Equal: the lower id.

    Of workers that are about as fast, none is preferred for its measured speed: of idle ones it would always win, and
    the sessions that are idle there come back."""
    if binding == "free_kv":
        return min(
            candidates, key=lambda load: (load.num_promised_tokens - load.num_kv_tokens, load.worker_id), default=None
        )
    measure = measure_active_load if binding == "least_active" else measure_load
    loads = list(candidates)
    fastest = min((load.decode_correction for load in loads), default=1.0)
    return min(loads, key=lambda load: (measure(load, now, fastest), load.worker_id), default=None)


def measure_load(load: WorkerLoad, now: float, fastest: float) -> float:
    """KV promised in pools, plus seconds of prefill waiting, plus the step that one more sequence would get, in 50 ms:
    each is about 1 on a worker that is full in that respect. fastest: the least decode correction of all."""
    return load.kv_share + load.wait_s(now) + _step_s(load, 1, fastest) / STEP_OF_A_FULL_BATCH_S


def measure_active_load(load: WorkerLoad, now: float, fastest: float) -> float:
    kv_share = load.active_share + 0.1 * load.kv_share
    return kv_share + load.wait_s(now) + _step_s(load, 1 + load.num_to_decode, fastest) / STEP_OF_A_FULL_BATCH_S


def _step_s(load: WorkerLoad, num_more: int, fastest: float) -> float:
    step_s = load.decode_step_s(num_more)
    if load.decode_correction <= SAME_SPEED * fastest:
        step_s *= fastest / load.decode_correction
    return step_s
