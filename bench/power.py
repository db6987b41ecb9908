"""Power, clocks, utilisation and memory of an NVIDIA device, sampled beside a timed region.

A device that is not there is reported as absent, never as zeros.
"""

from __future__ import annotations

import threading
import time
from statistics import fmean
from types import TracebackType
from typing import Any

ABSENT = {"absent": "no NVIDIA device"}
INTERVAL = 0.02
"""Seconds between samples; the driver renews its reading of power about as often."""


def library() -> Any | None:
    """`pynvml`, ready to be asked, or None where it finds no device."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml if pynvml.nvmlDeviceGetCount() else None
    except Exception:  # not installed, or no driver: NVMLError is a class of the library that may be missing
        return None


class PowerSampler:
    """`with PowerSampler() as sampler: ...`; then `sampler.summary(samples)`.

    Args:
        nvml: the library, or a stand-in; by default the one that is installed.
        index: which device, as NVML counts them.
        interval: seconds between samples.
    """

    def __init__(self, nvml: Any | None = None, index: int = 0, interval: float = INTERVAL) -> None:
        self.nvml = nvml or library()
        self.handle = self.nvml.nvmlDeviceGetHandleByIndex(index) if self.nvml else None
        self.interval = interval
        self.readings: list[dict[str, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PowerSampler:
        if self.nvml:
            self._read()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.nvml:
            self._over.set()
            self._thread.join()
            self._read()

    def summary(self, samples: int) -> dict[str, Any]:
        """Energy and means over the region.

        Args:
            samples: that were trained on in it.

        Returns:
            `seconds`, `joules`, `joules per 1000 samples`, means of `watts`, `sm MHz`, `memory MHz`, `utilisation %`,
            and the largest `memory bytes`; or `{"absent": reason}`.
        """
        if not self.readings:
            return dict(ABSENT)
        pairs = list(zip(self.readings, self.readings[1:], strict=False))
        joules = sum((b["at"] - a["at"]) * (a["watts"] + b["watts"]) / 2 for a, b in pairs)
        means = {
            key: fmean(r[key] for r in self.readings) for key in ("watts", "sm MHz", "memory MHz", "utilisation %")
        }
        return {
            "seconds": self.readings[-1]["at"] - self.readings[0]["at"],
            "joules": joules,
            "joules per 1000 samples": 1000 * joules / samples,
            **means,
            "memory bytes": max(r["memory bytes"] for r in self.readings),
        }

    def _sample(self) -> None:
        while not self._over.wait(self.interval):
            self._read()

    def _read(self) -> None:
        nvml, handle = self.nvml, self.handle
        assert nvml
        self.readings.append(
            {
                "at": time.monotonic(),
                "watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                "sm MHz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                "memory MHz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                "utilisation %": nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
                "memory bytes": nvml.nvmlDeviceGetMemoryInfo(handle).used,
            }
        )


def driver_and_clocks(nvml: Any | None = None, index: int = 0) -> dict[str, Any]:
    """Driver version and the highest clocks of a device; `{"nvml": reason}` where they cannot be asked for."""
    nvml = nvml or library()
    if nvml is None:
        return {"nvml": ABSENT["absent"]}
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    return {
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "highest sm MHz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "highest memory MHz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
    }
