import pytest
import torch

from baton.cluster.actors import gpu_kv_bytes
from baton.core.errors import ConfigError

GIB = 1 << 30
WEIGHTS = 12 * GIB


def show_gpu(monkeypatch: pytest.MonkeyPatch, *, free: int, total: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))


def test_workers_of_one_gpu_leave_room_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    free = total = 80 * GIB
    for _ in range(2):
        show_gpu(monkeypatch, free=free, total=total)
        kv_bytes = gpu_kv_bytes(0.5, WEIGHTS)
        assert kv_bytes == 23 * GIB  # 36 are its part, less weights and workspace
        free -= kv_bytes + WEIGHTS
    assert free >= 0.1 * total


def test_what_others_take_of_a_gpu_is_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpu(monkeypatch, free=20 * GIB, total=80 * GIB)
    assert gpu_kv_bytes(1.0, WEIGHTS) == 7 * GIB


def test_too_little_gpu_memory_is_told_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpu(monkeypatch, free=12 * GIB, total=80 * GIB)
    with pytest.raises(
        ConfigError, match=r"12\.0 GiB of 80\.0 GiB .* 12\.0 GiB weights .* leaves 0 B for KV"
    ) as caught:
        gpu_kv_bytes(0.5, WEIGHTS)
    assert "\n" not in str(caught.value)
