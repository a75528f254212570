"""Where and with what a benchmark ran: part of every result file."""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def machine(*packages: str) -> dict[str, str]:
    """Commit, processor, cores and versions."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    with open("/proc/cpuinfo") as lines:
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return {
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def faster_dtype() -> str:
    """bfloat16 or float32: which the processor multiplies faster. Without instructions for bfloat16 that is float32, by
    five to ten times; with them bfloat16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on a busy machine say nothing of the processor
    try:
        return min(("bfloat16", "float32"), key=_product_seconds)
    finally:
        torch.set_num_threads(threads)


def _product_seconds(dtype: str) -> float:
    x, weights = (torch.randn(rows, 256, dtype=getattr(torch, dtype)) for rows in (64, 736))
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        torch.nn.functional.linear(x, weights)
        times.append(time.perf_counter() - begin)
    return min(times)
