"""One of the ranks 1 to N-1 of a tensor-parallel worker: runs what rank 0 runs, on its own heads.

Started by rank 0 (rank_group.py) as `python -m shared.engine.rank_process CONTROL_FD MEMORY_FD`, it ends when rank 0
closes the control socket or dies. An error ends it with a traceback and status 1, which rank 0 notices.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

import torch
import torch.distributed

from shared.child_process import die_with_parent
from shared.engine.host_memory import map_common_memory
from shared.engine.model_loading import read_context_limits
from shared.engine.rank_messages import RankReady, RankStarted, RankStep, decode_items, receive, send
from shared.engine.step_batch import build_step_batch
from shared.engine.tensor_parallel import RankSpec, join_group, load_shard
from shared.log import configure_logging


def main(control: socket.socket, memory_descriptor: int) -> None:
    spec = receive(control, RankSpec)
    if spec is None:
        return
    configure_logging(f"rank-{spec.rank}")
    torch.set_num_threads(spec.threads)
    send(control, RankStarted())
    join_group(spec)
    decoder = load_shard(spec, map_common_memory(memory_descriptor, spec.shard_bytes))
    max_context_tokens, vocab_size = read_context_limits(decoder.model.config)
    send(control, RankReady())
    with torch.inference_mode():
        while (step := receive(control, RankStep)) is not None:
            decoder.forward(build_step_batch(decode_items(step), decoder.pool, max_context_tokens, vocab_size))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    die_with_parent(int(os.environ["AMPD_PARENT_PID"]))
    for number in (signal.SIGTERM, signal.SIGINT):
        # a stop of all processes at once, as of a container: rank 0 drains first, and then closes the control socket
        signal.signal(number, signal.SIG_IGN)
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
