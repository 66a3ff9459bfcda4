"""A tensor-parallel worker's ranks, from rank 0: the worker's own process, which starts the others and leads them.

    start the children -> join the group -> everyone loads its shard -> steps -> close

A rank that ends or hangs ends the worker: its share of weights and KV is gone. Nothing waits for it for ever: each
collective operation has a timeout, and a dead process breaks its connections at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
import torch.distributed

from shared.engine.host_memory import create_common_memory, map_common_memory
from shared.engine.rank_messages import RankReady, RankStarted, encode_step, receive, send
from shared.engine.sharded_pool import ShardedKvPool
from shared.engine.step import StepItem
from shared.engine.step_batch import StepBatch
from shared.engine.tensor_parallel import RankSpec, join_group, load_shard
from shared.engine.transformers_decoder import TransformersDecoder
from shared.errors import AmpdError, ErrorCode

LOADING_TIMEOUT_S = 600.0  # for another rank's imports, and for its weights after ours are there
STOP_GRACE_S = 2.0
DEATH_NOTICE_S = 2.0  # a broken connection is seen before the process's status is
WATCH_PERIOD_S = 0.5

Message = TypeVar("Message")


class RankFailed(AmpdError):
    """A rank ended, or did not answer in time: the worker cannot go on."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.INTERNAL, f"tensor parallelism: {message}")


class RankGroup:
    """Use `start`, from the main thread: the ranks are killed when the thread that started them ends.

    `pool` is the KV of all ranks as one. `forward` is for one thread at a time, `close` for when none is in it.
    """

    def __init__(self, spec: RankSpec, folder: Path) -> None:
        self._spec = spec
        self._folder = folder
        self._children: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        self._failure: RankFailed | None = None
        self._decoder: TransformersDecoder | None = None
        self.pool: ShardedKvPool

    @classmethod
    def start(cls, spec: RankSpec) -> RankGroup:
        """All ranks with their weights and pools, ready for steps. `spec` is rank 0's, its store_path yet to be made.

        Raises RankFailed, and what load_shard raises. One group a process: torch.distributed has one default group.
        """
        folder = Path(tempfile.mkdtemp(prefix="ampd-ranks-"))
        group = cls(msgspec.structs.replace(spec, store_path=str(folder / "store")), folder)
        try:
            group._load()
        except BaseException:
            group.close()
            raise
        return group

    @property
    def name(self) -> str:
        assert self._decoder is not None
        return f"{self._decoder.name} x {self._spec.parallel_degree}"

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Logits of the sampled rows, as TransformersDecoder.forward; all ranks' KV is in their pools afterwards.

        Raises RankFailed, now and in every later call.
        """
        assert self._decoder is not None
        if self._failure is not None:
            raise self._failure
        with self._failing_together("in a step"):
            self._tell(batch.items)
            return self._decoder.forward(batch)

    async def watch(self) -> None:
        """Raise RankFailed as soon as a rank has ended, also while there are no steps."""
        while self._find_ended() is None:  # noqa: ASYNC110 - a process's end has no event here
            await asyncio.sleep(WATCH_PERIOD_S)
        raise self._fail("between steps", None)

    def close(self) -> None:
        """End the ranks; a second call does nothing."""
        for _, control in self._children:
            control.close()
        for process, _ in self._children:
            try:
                process.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._children.clear()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---------------------------------------------------------------------------------------- start

    def _load(self) -> None:
        spec = self._spec
        descriptors = [
            create_common_memory(f"ampd-kv-rank-{rank}", spec.shard_bytes) for rank in range(spec.parallel_degree)
        ]
        try:
            regions = [map_common_memory(descriptor, spec.shard_bytes) for descriptor in descriptors]
            for rank in range(1, spec.parallel_degree):
                self._children.append(_start_rank(spec, rank, descriptors[rank]))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        for rank, (_, control) in enumerate(self._children, start=1):
            try:
                send(control, msgspec.structs.replace(spec, rank=rank))
            except OSError as error:
                raise self._fail("while it started", error) from error
        self._expect_from_all(RankStarted, "while it started")
        with self._failing_together("while they met"):
            join_group(spec)
        with self._failing_together("while they loaded the model"):
            self._decoder = load_shard(spec, regions[0])
        self._expect_from_all(RankReady, "while it loaded the model")
        shutil.rmtree(self._folder)  # they have met; whatever ends this process now, nothing is left behind
        for _, control in self._children:
            control.settimeout(spec.timeout_s)
        self.pool = ShardedKvPool(spec.layout, spec.num_blocks, regions)

    def _expect_from_all(self, message_type: type[Message], when: str) -> None:
        for _, control in self._children:
            control.settimeout(LOADING_TIMEOUT_S)
            try:
                message = receive(control, message_type)
            except OSError as error:
                raise self._fail(when, error) from error
            if message is None:
                raise self._fail(when, None)

    # ------------------------------------------------------------------------------------- failures

    def _tell(self, items: Sequence[StepItem]) -> None:
        message = encode_step(items)
        for _, control in self._children:
            try:
                control.sendall(message)
            except OSError as error:
                raise self._fail("in a step", error) from error

    @contextlib.contextmanager
    def _failing_together(self, when: str) -> Iterator[None]:
        """Turn what a broken collective operation raises into RankFailed; other errors are errors of the code."""
        try:
            yield
        except RuntimeError as error:
            # torch has a type of its own for this, but gloo's errors are plain ones that name their source file
            if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
                raise self._fail(when, error) from error
            raise

    def _fail(self, when: str, cause: Exception | None) -> RankFailed:
        deadline = time.monotonic() + DEATH_NOTICE_S
        while (ended := self._find_ended()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended is not None:
            rank, status = ended
            reason = f"rank {rank} ended {when} with status {status}: what it wrote to stderr says why"
        else:
            reason = f"the ranks did not keep together {when}: {cause}"
        self._failure = RankFailed(reason)
        return self._failure

    def _find_ended(self) -> tuple[int, int] | None:
        for rank, (process, _) in enumerate(self._children, start=1):
            status = process.poll()
            if status is not None:
                return rank, status
        return None


def _start_rank(spec: RankSpec, rank: int, memory_descriptor: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and our end of its control socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        descriptors = (theirs.fileno(), memory_descriptor)
        process = subprocess.Popen(
            [sys.executable, "-m", "shared.engine.rank_process", *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env={**os.environ, "AMPD_PARENT_PID": str(os.getpid()), "OMP_NUM_THREADS": str(spec.threads)},
            start_new_session=True,  # a terminal's Ctrl-C is for rank 0, which still needs the others while it drains
        )
    return process, ours
