"""Ranks with a GPU each, as real processes: two of them give what one gives."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ..ranks import Rank, Ranks
from ..unit.engine.sharded import Setting, alone, meet, serve
from .conftest import VOCABULARY

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

TIE = 1e-3  # logits are of the order of 10; sums in another order differ by less


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(2)
    yield processes
    processes.close()


def meet_on_gpus(rank: Rank) -> dict[str, Any]:
    """Each meeting."""
    device = torch.device("cuda", rank.rank)
    with_others = meet(rank, device)
    own = torch.arange(6, dtype=torch.float32, device=device).view(2, 3) + 10 * rank.rank
    found: dict[str, Any] = {
        "all_reduce": with_others.all_reduce(own.clone()).tolist(),
        "gather_last": with_others.gather_last(own).tolist(),
        "broadcast": with_others.broadcast(own.long()).tolist(),
        "nothing": tuple(with_others.gather_last(own[:0]).shape),
    }
    with_others.barrier()
    with_others.close()
    assert not torch.distributed.is_initialized()
    return found


def test_meetings_give_what_they_say(ranks: Ranks) -> None:
    first, second = ranks.run(meet_on_gpus, 2)
    zero = torch.arange(6, dtype=torch.float32).view(2, 3)
    one = zero + 10
    total, beside = (zero + one).tolist(), torch.cat((zero, one), -1)
    assert first["all_reduce"] == second["all_reduce"] == total
    assert first["broadcast"] == second["broadcast"] == zero.tolist()
    assert (first["gather_last"], second["gather_last"]) == (beside.tolist(), [[], []])
    assert (first["nothing"], second["nothing"]) == ((0, 6), (0, 0))


def sum_in_graphs(rank: Rank) -> None:
    """Captured sums of few rows and of many give, replayed, what they should, however the two are mixed."""
    from baton.engine.parallel.peers import Peers, add_rms_norm

    device = torch.device("cuda", rank.rank)
    peers = meet(rank, device)
    assert isinstance(peers, Peers), "the GPUs do not reach each other's memory"

    def numbers(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)

    work = []
    for rows in (1, 3, 512, 40, 300):
        parts, stream, weight = [numbers(at, rows, 4096) for at in range(2)], numbers(2, rows, 4096), numbers(3, 4096)
        delta, started = parts[rank.rank].clone(), stream.clone()
        out = torch.empty_like(stream)

        def run(out=out, delta=delta, stream=stream, weight=weight) -> None:  # type: ignore[no-untyped-def]
            for _ in range(3):  # as layers follow each other
                out.copy_(add_rms_norm(peers, delta, stream, weight, 1e-5))

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        work.append((graph, parts, started, weight, stream, out, delta))  # a graph keeps nothing alive
    for turn in range(20):
        for graph, parts, started, weight, stream, out, _ in work:
            stream.copy_(started)
            graph.replay()
            total = started.float()
            for _ in range(3):
                total = (total + (parts[0].float() + parts[1].float())).bfloat16().float()
            off = stream.float() - total
            assert not off.any(), f"{len(stream)} rows, turn {turn}: {int((off != 0).sum())} by {off.abs().max()}"
            normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()
            torch.testing.assert_close(out.float(), normed, rtol=2**-7, atol=2**-7)
    tokens = torch.arange(9, device=device) * (1 - rank.rank)
    assert peers.broadcast(tokens).tolist() == list(range(9))
    part = numbers(rank.rank, 600, 64128)  # more than fits the slots at once
    beside = peers.gather_last(part)
    if rank.rank == 0:
        assert torch.equal(beside, torch.cat((part, numbers(1, 600, 64128)), 1))
    peers.barrier()
    peers.close()


def test_sums_that_were_captured_meet_at_each_replay(ranks: Ranks) -> None:
    ranks.run(sum_in_graphs, 2)


def left_alone(rank: Rank) -> bool:
    """Rank 1 does not come: rank 0's kernel ends when it is told to, and its device is as good as before."""
    device = torch.device("cuda", rank.rank)
    peers = meet(rank, device)
    if rank.rank == 0:
        peers.all_reduce(torch.ones(1000, 4096, dtype=torch.bfloat16, device=device))
        peers.close()
        torch.cuda.synchronize()
        return bool((torch.ones(8, device=device) + 1 == 2).all())
    peers.close()
    return True


def test_a_rank_that_nobody_meets_is_not_stuck_once_it_closes(ranks: Ranks) -> None:
    assert ranks.run(left_alone, 2) == [True, True]


def pools_of_each_other(rank: Rank) -> list[float]:
    """Rank 0 reads and writes rank 1's pool through its own device."""
    from baton.core.ids import BlockId
    from baton.core.tickets import Geometry
    from baton.engine.kv_cache import KvCache
    from baton.engine.parallel.shared_pool import open_pool
    from baton.kv_transfer.rank_pools import RankPools

    device = torch.device("cuda", rank.rank)
    with_others = meet(rank, device)
    geometry = Geometry(
        num_layers=2, num_kv_heads=2, head_size=64, block_tokens=16, dtype="bfloat16", fingerprint="any"
    )
    cache = KvCache(8, geometry, device, range(rank.rank, rank.rank + 1), shared=True)
    cache.pool.fill_(rank.rank + 1)
    assert cache.shared is not None
    if rank.rank == 1:
        rank.report(cache.shared.handle)
    with_others.barrier()
    if rank.rank == 0:
        (handle,) = rank.reports()
        mapped = open_pool(handle, device)
        assert mapped.device == device
        pools = RankPools((cache.pool, mapped), (range(1), range(1, 2)))
        blocks = [BlockId(5), BlockId(2)]
        data = pools.gather(blocks)
        whole = torch.from_numpy(data).view(torch.bfloat16).view(2, 2, 2, 2, 16, 64)
        assert (whole[:, :, :, 0] == 1).all()
        assert (whole[:, :, :, 1] == 2).all()
        pools.scatter(blocks, torch.from_numpy(data).view(torch.bfloat16).mul(3).view(torch.uint8).numpy())
        del mapped, pools
    with_others.barrier()
    found: list[float] = cache.pool[:, 0, 0, 0, 0, 0].tolist()
    with_others.barrier()
    with_others.close()
    return found


def test_rank_0_moves_blocks_of_both_pools(ranks: Ranks) -> None:
    first, second = ranks.run(pools_of_each_other, 2)
    assert first == [1, 1, 3, 1, 1, 3, 1, 1]
    assert second == [2, 2, 6, 2, 2, 6, 2, 2]


KINDS = [
    ("Llama", {}, 0),
    ("Llama", {"num_key_value_heads": 1, "vocab_size": VOCABULARY}, 0),
    ("Qwen3", {"head_dim": 128, "num_key_value_heads": 4}, 0),
    ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, 0),
    ("Llama", {}, 14),  # as many blocks: some sequences are swapped out
]


@pytest.mark.parametrize(("family", "changes", "blocks"), KINDS, ids=str)
def test_two_gpus_answer_like_one(
    family: str, changes: dict[str, Any], blocks: int, checkpoint: Callable[..., Path], ranks: Ranks
) -> None:
    numbers = random.Random(0)
    prompts = [tuple(numbers.randrange(2, VOCABULARY) for _ in range(length)) for length in (5, 70, 33, 1, 17)]
    setting = Setting(checkpoint(family, **changes), prompts, new_tokens=24, device="cuda", kv_bytes=32 << 20)
    whole = alone(setting)
    rank_block_bytes = 3 * 2 * 16 * 64 * 4  # one KV head each
    few = {"kv_bytes": blocks * rank_block_bytes, "swap_bytes": 16 << 20} if blocks else {}
    split, _ = ranks.run(serve, 2, Setting(**{**vars(setting), **few}))
    assert bool(split.swapped) == bool(blocks)
    if not blocks:
        torch.testing.assert_close(split.logits, whole.logits, rtol=0, atol=TIE)
    assert split.tokens == whole.tokens
