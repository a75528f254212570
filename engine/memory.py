"""How much memory KV caches take when nobody says how much. No torch: whoever plans a cluster asks here too."""

import os
from pathlib import Path

GPU_SHARE = 0.9  # of its part of a GPU that an engine takes; the rest is the context's and the kernels' workspaces
GPU_WORKSPACE = 1 << 30
GPU_LEAST = 64 << 20  # less KV than this is no use

_CPU_SHARE = 0.25  # of free memory, for all engines together
_CPU_MOST = 1 << 30
_CPU_LEAST = 64 << 20
_SWAP_SHARE = 0.1  # of free host memory, for all engines together
_SWAP_MOST = 4 << 30


def usable_bytes(memory: int, share: float = 1.0) -> int:
    """What an engine takes of a GPU that it has a share of."""
    return int(memory * share * GPU_SHARE)


def kv_room(usable: int, weight_bytes: int) -> int:
    """What is left for KV; negative when the weights alone do not fit."""
    return usable - weight_bytes - GPU_WORKSPACE


def cpu_kv_bytes(free_bytes: int, one_request: int, engines: int = 1) -> int:
    """Of each of so many engines of this machine, of whose memory so much is free beside what they take anyway: a
    share within bounds, and what one request of full length takes in any case."""
    share = int(max(0, free_bytes) * _CPU_SHARE) // engines
    return max(min(share, _CPU_MOST), _CPU_LEAST, one_request)


def default_swap_bytes(free_bytes: int, engines: int = 1) -> int:
    """Host memory for the KV of preempted sequences, of each of so many engines that decode."""
    return min(int(free_bytes * _SWAP_SHARE) // max(engines, 1), _SWAP_MOST)


def free_memory() -> int:
    """Bytes this process may still take: of the machine, and of its control group where that is less."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            break
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control groups of version 2 here
    return free
