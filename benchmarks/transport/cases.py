"""What is moved, and how often it is measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from shared.core.types import KvLayout

# 4 KiB a token, so that the smallest case is one token; 512 KiB a block, as Llama-3.2-1B has with 16 tokens a block
LAYOUT = KvLayout("bench", 4, 4, 64, 128, "bfloat16")
NUM_BLOCKS = 512
MIB, GIB = 1 << 20, 1 << 30
SECRET = b"benchmark ticket secret, 32 byte"
SENDER, RECEIVER = ("sender", 1), ("receiver", 2)
FAMILIES = ("tcp", "unix", "shm", "nixl", "nixl-tcp")


@dataclass(frozen=True)
class Case:
    name: str
    num_tokens: int
    scattered: bool = False

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * LAYOUT.bytes_per_token

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // LAYOUT.block_size)


CASES = (
    Case("4 KiB", 1),
    Case("1 MiB", 256),
    Case("16 MiB", 4_096),
    Case("256 MiB", 65_536),
    Case("512 scattered blocks", 65_536, scattered=True),
)


@dataclass
class Samples:
    """Wall and CPU seconds (both processes) of the repeats of one contender in one case."""

    num_bytes: int
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        wall, cpu = statistics.median(self.wall_s), statistics.median(self.cpu_s)
        return {
            "wall_s": wall,
            "gib_per_s": self.num_bytes / wall / GIB,
            "cpu_s_per_gib": cpu * GIB / self.num_bytes,
            "min_wall_s": min(self.wall_s),
            "max_wall_s": max(self.wall_s),
        }
