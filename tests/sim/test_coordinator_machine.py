"""Random histories: requests, losses, repetitions, deaths of workers and of the coordinator, in any order.

Whatever happens: every accepted round ends once, by its deadline + 2 s; its tokens are those of a fault-free run; no
session is lost; after close nothing is left (SimCluster and SimClient assert it as they go).
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from moving_policy import MIXED, MOVING, configure
from sim_client import PlannedRound
from sim_cluster import Faults, SimCluster
from sim_worker import SimWorker

from shared.core.policies import POLICIES, SchedulingPolicy
from shared.core.types import SessionKey
from shared.errors import ErrorCode
from shared.messages import Role

MAX_WORKERS, MAX_SESSIONS = 5, 4


class CoordinatorMachine(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 2**32),
        policy=st.sampled_from([*POLICIES.values(), MOVING, MIXED]),
        num_prefill=st.integers(0, 2),
        num_decode=st.integers(1, 2),
    )
    def start(self, seed: int, policy: SchedulingPolicy, num_prefill: int, num_decode: int) -> None:
        self.cluster = SimCluster(seed=seed, config=configure(policy, min_staged_tokens=1))
        for number in range(num_decode):
            self.cluster.add_worker(f"decode-{number}", "decode")
        for number in range(num_prefill):
            self.cluster.add_worker(f"prefill-{number}", "prefill")

    # ---- what clients do

    @precondition(lambda self: len(self.cluster.clients) < MAX_SESSIONS)
    @rule()
    def open_session(self) -> None:
        self.cluster.add_client(f"s{len(self.cluster.clients)}")

    @precondition(lambda self: any(not c.closing for c in self.cluster.clients.values()))
    @rule(
        which=st.integers(0, MAX_SESSIONS),
        tokens=st.lists(st.integers(1, 999), min_size=1, max_size=30),
        max_output=st.integers(1, 20),
        deadline_s=st.sampled_from([0.3, 5.0, 60.0]),
        as_chat=st.booleans(),
    )
    def submit(self, which: int, tokens: list[int], max_output: int, deadline_s: float, as_chat: bool) -> None:
        clients = [c for c in self.cluster.clients.values() if not c.closing]
        clients[which % len(clients)].plan(PlannedRound(tokens, max_output, deadline_s, as_chat))

    @precondition(lambda self: any(not c.closing for c in self.cluster.clients.values()))
    @rule(which=st.integers(0, MAX_SESSIONS), close=st.booleans())
    def cancel_or_close(self, which: int, close: bool) -> None:
        clients = [c for c in self.cluster.clients.values() if not c.closing]
        client = clients[which % len(clients)]
        client.cancel()
        if close:
            client.close()

    # ---- what goes wrong

    def _pick(self, which: int) -> SimWorker | None:
        workers = list(self.cluster.workers.values())
        return workers[which % len(workers)] if workers else None

    @rule(which=st.integers(0, MAX_WORKERS), again=st.booleans())
    def kill_worker(self, which: int, again: bool) -> None:
        worker = self._pick(which)
        if worker is not None:
            self.cluster.kill_worker(worker.worker_id)
            if again:
                self.cluster.add_worker(worker.worker_id, worker.role)

    @precondition(lambda self: len(self.cluster.workers) < MAX_WORKERS)
    @rule(role=st.sampled_from(["prefill", "decode", "both"]))
    def add_worker(self, role: str) -> None:
        self.cluster.add_worker(f"{role}-{self.cluster.take_number()}", role)

    @rule(which=st.integers(0, MAX_WORKERS), role=st.sampled_from(["prefill", "decode", "both"]))
    def change_role(self, which: int, role: Role) -> None:
        worker = self._pick(which)
        if worker is not None:
            self.cluster.change_role(worker.worker_id, role)

    @rule(which=st.integers(0, MAX_WORKERS), what=st.sampled_from(["drain", "forget", "fail"]))
    def trouble_worker(self, which: int, what: str) -> None:
        worker = self._pick(which)
        if worker is None:
            return
        if what == "drain":
            worker.draining = not worker.draining
        elif what == "forget":
            worker.forget_kv()
        else:
            for key in list(worker.sessions):
                worker.fail_run(key, ErrorCode.OUT_OF_BLOCKS)

    @rule(down_s=st.sampled_from([0.0, 0.01, 0.5, 5.0]))
    def restart_coordinator(self, down_s: float) -> None:
        self.cluster.kill_coordinator()
        self.cluster.run_for(down_s)
        self.cluster.start_coordinator()

    @rule(
        drop=st.sampled_from([0.0, 0.02, 0.2]),
        duplicate=st.sampled_from([0.0, 0.2]),
        slow=st.sampled_from([0.0, 0.1]),
        append_fails=st.sampled_from([0.0, 0.1]),
        cut=st.booleans(),
    )
    def change_network(self, drop: float, duplicate: float, slow: float, append_fails: float, cut: bool) -> None:
        self.cluster.faults = Faults(drop, duplicate, slow, append_fails, cut)

    @rule(duration_s=st.sampled_from([0.002, 0.01, 0.05, 0.3, 1.5, 5.0]))
    def wait(self, duration_s: float) -> None:
        self.cluster.run_for(duration_s)

    def teardown(self) -> None:
        if hasattr(self, "cluster"):
            for worker in self.cluster.workers.values():
                worker.draining = False
            self.cluster.finish()
            for key, client in self.cluster.clients.items():
                assert key == SessionKey("tenant", client.key.session)
                assert all(planned.outcome is not None for planned in client.done)


CoordinatorMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
TestCoordinatorMachine = CoordinatorMachine.TestCase
