"""What a compiled GPU kernel occupies, and how many of its warps an SM can hold at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

WARP = 32
REGISTERS = 64 * 1024
"""Of an SM, every architecture below; a warp takes them in units of `REGISTER_UNIT`."""
REGISTER_UNIT = 256
QUARTERS = 4
"""An SM's warps and registers are divided into so many equal parts."""

PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Limits:
    """Of an SM: shared memory in bytes, what each block of it costs besides its own, warps, blocks."""

    shared: int
    shared_unit: int
    shared_overhead: int
    warps: int
    blocks: int


LIMITS = {
    70: Limits(96 * 1024, 256, 0, 64, 32),
    75: Limits(64 * 1024, 256, 0, 32, 16),
    80: Limits(164 * 1024, 128, 1024, 64, 32),
    90: Limits(228 * 1024, 128, 1024, 64, 32),
}
"""The CUDA programming guide's table of technical specifications, by compute capability times 10."""


@dataclass(frozen=True)
class Resources:
    """One kernel, compiled: its name, who wrote it ("cuda", "triton"), for what, and what a block of it takes."""

    kernel: str
    provider: str
    arch: int
    dtype: str
    shape: str
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int

    def occupancy(self) -> float:
        """Warps that an SM holds of those that it could, in [0, 1]; 0 where not even one block fits."""
        limits = LIMITS[self.arch]
        warps = -(-self.threads // WARP)
        of_warp = _whole(max(self.registers, 1) * WARP, REGISTER_UNIT)
        by_registers = REGISTERS // QUARTERS // of_warp * QUARTERS // warps
        shared = _whole(self.shared_bytes, limits.shared_unit) + limits.shared_overhead
        by_shared = limits.shared // shared if shared else limits.blocks
        blocks = min(by_registers, by_shared, limits.warps // warps, limits.blocks)
        return blocks * warps / limits.warps


def ptxas_usage(log: str) -> dict[str, tuple[int, int, int]]:
    """What `ptxas -v` says: registers of a thread, bytes spilled and bytes of static shared memory, by symbol."""
    return {
        symbol: (int(registers), int(stored) + int(loaded), int(shared or 0))
        for symbol, stored, loaded, registers, shared in PTXAS.findall(log)
    }


def _whole(count: int, unit: int) -> int:
    return -(-count // unit) * unit
