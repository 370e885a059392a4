"""What the figures depend on: the machine, its load, its memory, and how fast it multiplies and reads."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Processor, cores, threads, load, memory and versions; of a GPU its name."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.processor())
    facts = {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def available_bytes(device: torch.device) -> int:
    """Memory that can be allocated now without swapping."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])


def resident_bytes(field: str) -> int:
    """`VmRSS`, what is resident now, or `VmHWM`, its peak since the last `forget_peak`; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def forget_peak() -> None:
    """Have the kernel count the peak of the resident memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def stopwatch(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that `call` takes; on a GPU between two events on its stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record()
    call()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1000


@torch.no_grad()
def peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs a second of a square matrix product, and bytes a second of reading a float32 matrix; the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    square = torch.randn(size, size, device=device, dtype=dtype)
    flops = max(2 * size**3 / stopwatch(lambda: square @ square, device) for _ in range(5))
    tall = torch.randn(32768 if device.type == "cuda" else 8192, 8192, device=device)
    vector = torch.randn(8192, device=device)
    return flops, max(tall.nbytes / stopwatch(lambda: tall @ vector, device) for _ in range(5))
