"""What training takes of a machine: memory at most, and energy, where something counts it."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the energy counters of CPU packages (RAPL); many machines let nobody but root read them."""
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""Unit of `ru_maxrss`."""


class Usage:
    """Of one process, and of the device that it trains on.

    Energy is that of the whole CPU packages, or GPU, whoever else works on them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = self._counters()

    def take(self) -> dict[str, float]:
        """`peak_memory_mb` so far (of the process; on a GPU what torch has allocated), and `joules` since the last call
        where they are counted."""
        taken = {"peak_memory_mb": self._peak() / 1e6}
        before, self._before = self._before, self._counters()
        if self._before and before.keys() == self._before.keys():
            taken["joules"] = sum(_passed(before[key], now) for key, now in self._before.items())
        return taken

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES

    def _counters(self) -> dict[str, tuple[float, float]]:
        """Counter -> joules, and at how many it begins anew; none where nothing can be read."""
        return _of_gpu(self.device) if self.device.type == "cuda" else of_packages(POWERCAP)


def of_packages(powercap: Path) -> dict[str, tuple[float, float]]:
    """The counters of CPU packages, not of the parts of one."""
    counters = {}
    with suppress(OSError, ValueError):
        for package in sorted(powercap.glob("intel-rapl:*")):
            if package.name.count(":") == 1:
                joules, most = (
                    int((package / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj")
                )
                counters[package.name] = joules, most
        return counters
    return {}


def _of_gpu(device: torch.device) -> dict[str, tuple[float, float]]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return {"gpu": (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)}
    except Exception:  # no NVML, no such counter: energy is then not known
        return {}


def _passed(before: tuple[float, float], now: tuple[float, float]) -> float:
    """Joules between two readings, between which a counter may have begun anew once."""
    passed = now[0] - before[0]
    return passed if passed >= 0 else passed + now[1]
