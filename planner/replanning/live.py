"""A running cluster as the program sees it: its workers from their heartbeats, its workload from rounds that ended."""

from __future__ import annotations

import math
from collections import Counter, deque
from statistics import median

from planner.collector import attains_slo
from planner.planning.program import PlanProblem
from planner.planning.worker_kinds import MeasuredKind
from planner.planning.workload_model import RoundShape
from planner.replanning.observed import WINDOW_S, ObservedWorkload
from planner.replanning.running import RunningWorker, pose_problem
from shared.core.profile import Profile
from shared.errors import AmpdError
from shared.messages import Heartbeat, RoundObserved, Slo
from shared.profile_files import load_profile

SILENT_S = 5.0  # without a heartbeat for so long a worker is not planned with
MAX_OBJECTIVES = 1_000  # rounds whose objectives are remembered
MAX_WORKERS = 4_096


class LiveCluster:
    """Pure but for the profiles that it reads. `profile_name`: of workers that name none; a file's path serves those
    that name the profile in it, too."""

    def __init__(self, profile_name: str | None = None, window_s: float = WINDOW_S) -> None:
        self._default = profile_name
        self._workload = ObservedWorkload(window_s)
        self._objectives: deque[Slo] = deque(maxlen=MAX_OBJECTIVES)
        self._workers: dict[str, tuple[float, Heartbeat]] = {}

    def on_heartbeat(self, beat: Heartbeat, now: float) -> None:
        known = self._workers.get(beat.worker_id)
        if known is None and len(self._workers) >= MAX_WORKERS:
            self._workers = {name: one for name, one in self._workers.items() if now - one[0] < SILENT_S}
            if len(self._workers) >= MAX_WORKERS:
                return
        if known is None or known[1].incarnation != beat.incarnation or known[1].seq <= beat.seq:
            self._workers[beat.worker_id] = (now, beat)

    def on_round(self, observed: RoundObserved, now: float) -> None:
        """Rounds that failed have no usage, and say nothing."""
        usage = observed.usage
        if usage is None or usage.num_input_tokens + usage.num_output_tokens == 0:
            return
        delay_s = observed.delay_s if observed.delay_s is not None and math.isfinite(observed.delay_s) else 0.0
        shape = RoundShape(usage.num_history_tokens, usage.num_input_tokens, usage.num_output_tokens, max(0.0, delay_s))
        self._workload.add(f"{observed.tenant}/{observed.session}", shape, now, on_time=attains_slo(observed))
        self._objectives.append(observed.slo)

    def attainment(self, now: float) -> float:
        """Of the rounds that the workload is made of: share that met their objectives."""
        return self._workload.attainment(now)

    def list_beats(self, now: float) -> list[Heartbeat]:
        """Of workers that live and take work."""
        return [beat for seen, beat in self._workers.values() if now - seen < SILENT_S and not beat.draining]

    def describe(self, now: float) -> tuple[PlanProblem, list[RunningWorker]] | str:
        """The problem and the workers; or why there is nothing to plan with."""
        beats = self.list_beats(now)
        if not beats:
            return "no worker is heard"
        nameless = next((beat.worker_id for beat in beats if not (beat.profile or self._default)), None)
        if nameless is not None:
            return f"worker {nameless} names no profile of its timings: start the planner with --profile"
        model = self._workload.model(now)
        if model is None:
            return "too few rounds have ended to know the workload"
        workers = [self._describe_worker(beat) for beat in beats]
        try:
            profiles = {name: self._load(name) for name in sorted({worker.gpu_type for worker in workers})}
            measured = self._measure(beats, profiles)
            return pose_problem(workers, profiles, measured, model, self._common_objective()), workers
        except AmpdError as error:
            return error.message

    def _load(self, name: str) -> Profile:
        """Workers tell their profile's name, which is no path."""
        default = load_profile(self._default) if self._default else None
        return default if default is not None and name in (self._default, default.name) else load_profile(name)

    def _common_objective(self) -> Slo:
        return Counter(self._objectives).most_common(1)[0][0]

    def _describe_worker(self, beat: Heartbeat) -> RunningWorker:
        used = (beat.num_blocks - beat.num_free_blocks - beat.num_evictable_blocks) * beat.block_size
        return RunningWorker(
            worker_id=beat.worker_id,
            gpu_type=beat.profile or self._default or "",
            parallel_degree=beat.parallel_degree,
            role=beat.role,
            num_kv_tokens=max(0, used),
        )

    def _measure(self, beats: list[Heartbeat], profiles: dict[str, Profile]) -> dict[tuple[str, int], MeasuredKind]:
        """Medians over alike workers. A worker that has not measured its steps counts as its profile says."""
        alike: dict[tuple[str, int], list[Heartbeat]] = {}
        for beat in beats:
            name = beat.profile or self._default or ""
            profiles[name].degree(beat.parallel_degree)
            alike.setdefault((name, beat.parallel_degree), []).append(beat)
        return {
            kind: MeasuredKind(
                scale=median(_mean_scale(beat) for beat in same),
                num_kv_tokens=int(median(max(1, beat.num_blocks * beat.block_size) for beat in same)),
            )
            for kind, same in alike.items()
        }


def _mean_scale(beat: Heartbeat) -> float:
    scales = [scale for scale in (beat.prefill_scale, beat.decode_scale) if scale > 0.0]
    return sum(scales) / len(scales) if scales else 1.0
