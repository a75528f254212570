"""Workers that share a GPU share its memory: nobody says how much, and each gets an equal part."""

import pytest
import torch

from baton.cluster.preflight import measure_model

from .cluster import Cluster
from .conftest import MODEL
from .ledgers import workers


@pytest.fixture
def gpu_bytes(device: str) -> int:
    if device != "cuda":
        pytest.skip("the cluster serves on the CPU: give --device cuda")
    if torch.cuda.device_count() > 1:
        pytest.skip("each worker has a GPU of its own")
    return int(torch.cuda.get_device_properties(0).total_memory)


@pytest.mark.gpu
def test_two_workers_on_one_gpu_take_equal_parts_of_it(cluster: Cluster, gpu_bytes: int) -> None:
    token_bytes = measure_model(MODEL, "float32").kv_bytes_per_token
    taken = [each.num_blocks * each.block_tokens * token_bytes for each in workers(cluster).values()]
    print(f"KV of each worker, GiB of {gpu_bytes / 2**30:.1f}: {[round(each / 2**30, 2) for each in taken]}")
    assert len(taken) == 2
    assert sum(taken) < 0.9 * gpu_bytes
    assert min(taken) > 0.9 * max(taken)
