"""What a run ran on: GPU, driver, clocks and power, versions of everything. pynvml is used where it is there."""

from __future__ import annotations

import contextlib
import datetime
import platform
import re
import secrets
import shlex
import statistics
import subprocess
import threading

import torch
import triton

from bench.results import ROOT


def new_run_id() -> str:
    """Sorts by time; the tail keeps two runs of one second apart."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def describe(gpu: dict, seed: int, argv: list[str], telemetry: Telemetry) -> dict:
    """The environment of a run, for FAMILY.env.json. Absolute paths in the command line are cut to their last part."""
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "gpu": gpu["name"], "arch": gpu["arch"], "sm_count": gpu["sm_count"],
        "peak_tflops": gpu["tflops"], "peak_gbps": gpu["gbps"],
        "driver": telemetry.driver, "clocks": telemetry.limits, "power": telemetry.power_limit_w,
        "torch": torch.__version__, "triton": triton.__version__, "ptxas": _ptxas(), "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "python": platform.python_version(), "seed": seed, "inputs": "N(0, 1)",
        "fp8": "versions are timed on float8 inputs: quantising is outside the call",
        "command": shlex.join(re.sub(r"(^|=)/(\S*/)?", r"\1", word) for word in argv),
        "commit": _commit(),
    }  # fmt: skip


def _ptxas() -> str | None:
    with contextlib.suppress(Exception):  # an NVIDIA tool; its place differs between Triton's versions
        return triton.knobs.nvidia.ptxas.version
    return None


def _commit() -> str | None:
    """Short hash of the checkout, with "+" where it has changes; None outside git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return None


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


class Telemetry:
    """Reads SM clock (MHz), power (W) and temperature (C) ten times a second in a thread; silent without pynvml."""

    def __init__(self, gpu_name: str = "", period: float = 0.1):
        self.driver, self.limits, self.power_limit_w = None, None, None
        self._samples: list[tuple[float, float, float]] = []
        self._run: list[tuple[float, float, float]] = []
        self._stop = threading.Event()
        self._thread = None
        with contextlib.suppress(Exception):  # optional, and a container may forbid any part of it
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._device = pynvml, _nvml_device(pynvml, gpu_name)
            self.driver = _text(pynvml.nvmlSystemGetDriverVersion())
            self._read()
            self._thread = threading.Thread(target=self._watch, args=(period,), daemon=True)
            self._thread.start()
            self.power_limit_w = pynvml.nvmlDeviceGetEnforcedPowerLimit(self._device) / 1e3
            most = pynvml.nvmlDeviceGetMaxClockInfo
            self.limits = {
                "sm_max_mhz": most(self._device, pynvml.NVML_CLOCK_SM),
                "memory_max_mhz": most(self._device, pynvml.NVML_CLOCK_MEM),
            }

    def _read(self) -> tuple[float, float, float]:
        nvml, device = self._nvml, self._device
        clock = nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)
        temperature = nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)
        return clock, nvml.nvmlDeviceGetPowerUsage(device) / 1e3, temperature

    def _watch(self, period: float) -> None:
        while not self._stop.wait(period):
            with contextlib.suppress(Exception):
                self._samples.append(self._read())

    def lap(self) -> dict[str, float | None]:
        """Medians since the last lap, for a record; nulls where nothing was read."""
        samples, self._samples = self._samples, []
        self._run += samples
        return _medians(samples)

    def whole_run(self) -> dict[str, float | None]:
        """Medians of all laps."""
        return _medians(self._run)

    def close(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=2)


def _medians(samples: list[tuple[float, float, float]]) -> dict[str, float | None]:
    columns = list(zip(*samples, strict=True)) or [None] * 3
    names = ("sm_mhz", "power_w", "temperature_c")
    return {
        name: round(statistics.median(column), 1) if column else None
        for name, column in zip(names, columns, strict=True)
    }


def _nvml_device(nvml, gpu_name: str):
    """The first device of that name: NVML counts GPUs that CUDA_VISIBLE_DEVICES hides."""
    devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    same = [device for device in devices if _text(nvml.nvmlDeviceGetName(device)) == gpu_name]
    return (same or devices)[0]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
