"""Power is integrated over what a stand-in for NVML says; an absent device is absent."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bench import power


class FakeNvml:
    """One device that draws 100 W, then 300 W."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self) -> None:
        self.watts = iter([100, 300, 300])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"device {index}"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        assert handle == "device 0"
        return 1000 * next(self.watts)

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return {1: 1500, 2: 900}[clock]

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=80)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=2**30)


def test_joules_are_the_integral_of_watts(monkeypatch: pytest.MonkeyPatch) -> None:
    at = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr(power.time, "monotonic", lambda: next(at))
    sampler = power.PowerSampler(FakeNvml(), interval=60.0)
    for _ in range(3):
        sampler._read()
    summary = sampler.summary(samples=500)
    assert summary["seconds"] == 3.0
    assert summary["joules"] == 2 * 200 + 300
    assert summary["joules per 1000 samples"] == 1400
    assert (summary["sm MHz"], summary["memory MHz"], summary["utilisation %"]) == (1500, 900, 80)
    assert summary["memory bytes"] == 2**30


def test_the_thread_reads_at_both_ends() -> None:
    with power.PowerSampler(FakeNvml(), interval=60.0) as sampler:
        pass
    assert len(sampler.readings) == 2
    assert not sampler._thread.is_alive()


def test_no_device_is_reported_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "library", lambda: None)
    with power.PowerSampler() as sampler:
        pass
    assert sampler.summary(10) == {"absent": "no NVIDIA device"}
    assert power.driver_and_clocks() == {"nvml": "no NVIDIA device"}
