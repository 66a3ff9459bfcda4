"""KV from device memory to device memory, by the nixl lane: what tests/unit/test_transport_lanes.py has on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.core.types import KvLayout
from shared.engine.device_bytes import DeviceBytes
from shared.engine.kv_pool import KvPool
from shared.transport.flat_memory import HostBytes, add_sample
from shared.transport.nixl_lane import NixlLane
from shared.transport.protocol import Digest
from shared.transport.ranges import ByteRange

pytestmark = pytest.mark.gpu

LAYOUT = KvLayout(model="m", num_layers=4, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")


def test_a_device_copies_and_samples_as_the_host_does() -> None:
    data = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8)
    host = HostBytes(memoryview(bytearray(data.tobytes())))
    device = DeviceBytes(torch.from_numpy(data).cuda())
    ranges = [ByteRange(100, 70_000), ByteRange(300_000, 1 << 20)]
    digests = []
    for memory in (host, device):
        target = memory.allocate(1 << 20)
        target.copy_from(memory, [(0, 4_096, 500_000)])
        assert target.gather(np.arange(500_000)) == data[4_096:504_096].tobytes()
        digest = Digest()
        add_sample(digest, memory, ranges)
        digests.append(digest.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(("source", "target"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_blocks_and_parts_of_blocks_move_between_devices(source: str, target: str) -> None:
    """Two lanes of this process; the services' way, with leases, is tests/faults on the CPU."""
    sending, receiving = KvPool(LAYOUT, 40, source), KvPool(LAYOUT, 40, target)
    values = torch.randn(sending.tensor.shape, generator=torch.Generator().manual_seed(1))
    sending.tensor.copy_(values.to(torch.bfloat16))
    sender, receiver = NixlLane(sending, "sender"), NixlLane(receiving, "receiver")
    try:
        pool = receiver.open(None, ("sender", 1), sender.describe())  # type: ignore[arg-type]  # no connection is needed
        block = LAYOUT.bytes_per_block
        for ranges, targets in (
            ([ByteRange(3 * block, 5 * block)], [ByteRange(7 * block, 8 * block), ByteRange(2 * block, 3 * block)]),
            ([ByteRange(block + 512, block + 4_096)], [ByteRange(9 * block, 9 * block + 3_584)]),
        ):
            sent, came = Digest(), Digest()
            with sender.serving():
                reading = pool.begin(ranges, lambda: None, wait=True)
                assert reading is not None
                reading.finish(targets, came)
            sender.add_to_digest(sent, ranges)
            assert sent.digest() == came.digest()
            read = [receiving.flat.gather(np.arange(*one)) for one in targets]
            assert b"".join(read) == b"".join(sending.flat.gather(np.arange(*one)) for one in ranges)
    finally:
        receiver.close()
        sender.close()
