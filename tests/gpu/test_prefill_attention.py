"""Prefill attention equals a float64 reference, reads nothing it should not, and writes all it should."""

import math

import pytest
import torch
from torch import Tensor

from baton.kernels import prefill_tiles
from baton.kernels.prefill_attention import is_tiled, paged_prefill_attention, plan_prefill

# Largest error allowed, relative to the largest value of V: weights and result each keep 8 bits.
TOLERANCE = 2**-7
NUM_LAYERS, LAYER = 2, 1


class Problem:
    """Random chunks after random prefixes, in a pool whose every other place holds NaN."""

    def __init__(
        self,
        random: torch.Generator,
        chunks: list[tuple[int, int]],
        *,
        heads: int = 8,
        kv_heads: int = 2,
        head_size: int = 128,
        block_tokens: int = 16,
    ) -> None:
        """chunks: of each sequence how many tokens are cached and how many ask."""
        device, dtype = random.device, torch.bfloat16
        self.chunks = chunks
        self.lens = [prefix + count for prefix, count in chunks]
        self.starts = [0]
        for _, count in chunks:
            self.starts.append(self.starts[-1] + count)
        blocks_of = [-(-length // block_tokens) for length in self.lens]
        num_blocks = sum(blocks_of) + 3
        shape = (num_blocks, NUM_LAYERS, 2, kv_heads, block_tokens, head_size)
        self.pool = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.q = torch.randn(self.starts[-1], heads, head_size, device=device, generator=random).to(dtype)
        # Entries past a context name no block that exists.
        self.tables = torch.full((len(chunks), max(blocks_of) + 2), 2**31 - 1, dtype=torch.int32, device=device)
        self.kv = []  # [2, G, length, D] of each sequence
        order = torch.randperm(num_blocks, device=device, generator=random).to(torch.int32)
        for row, (length, count) in enumerate(zip(self.lens, blocks_of, strict=True)):
            kv = torch.randn(2, kv_heads, length, head_size, device=device, generator=random).to(dtype)
            self.kv.append(kv)
            mine, order = order[:count], order[count:]
            self.tables[row, :count] = mine
            for index, block in enumerate(mine.tolist()):
                part = kv[:, :, index * block_tokens : (index + 1) * block_tokens]
                self.pool[block, LAYER, :, :, : part.shape[2]] = part

    def run(self, window: int | None = None, q: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
        assert is_tiled(self.pool), "a reference tested against itself shows nothing"
        asked = self.q if q is None else q
        scale = self.q.shape[-1] ** -0.5
        edge = 3  # rows before and after that nobody may write
        wide = torch.full(
            (len(self.q) + 2 * edge, *self.q.shape[1:]), float("nan"), dtype=self.q.dtype, device=self.q.device
        )
        out = wide[edge:-edge]
        got = paged_prefill_attention(
            asked, self.pool, LAYER, self.tables, self.starts, self.lens, scale, window, out=out, lse=lse
        )
        assert got is out
        assert wide[:edge].isnan().all()
        assert wide[-edge:].isnan().all()
        return out

    def expected(self, window: int | None = None) -> tuple[Tensor, Tensor]:
        """In float64, sequence by sequence, written down as the definition has it. Result and log-sum-exp."""
        rows, sums = [], []
        for index, (prefix, count) in enumerate(self.chunks):
            q = self.q[self.starts[index] : self.starts[index + 1]].double()
            kv = self.kv[index].double().repeat_interleave(q.shape[1] // self.kv[index].shape[1], 1)
            scores = torch.einsum("thd,hcd->htc", q, kv[0]) / math.sqrt(q.shape[2])
            asks = torch.arange(prefix, prefix + count, device=q.device)[:, None]
            key = torch.arange(prefix + count, device=q.device)[None]
            unseen = key > asks if window is None else (key > asks) | (key <= asks - window)
            scores.masked_fill_(unseen, float("-inf"))
            rows.append(torch.einsum("htc,hcd->thd", scores.softmax(-1), kv[1]))
            sums.append(scores.logsumexp(-1).T)
        return torch.cat(rows), torch.cat(sums)

    def check(self, window: int | None = None) -> None:
        before = self.pool.view(torch.uint8).clone()
        lse = torch.full(self.q.shape[:2], float("nan"), device=self.q.device)
        result, sums = self.expected(window)
        error = (self.run(window, lse=lse).double() - result).abs().max().item()
        largest = max(kv[1].abs().max().item() for kv in self.kv)
        assert error <= TOLERANCE * largest, (error, largest)  # false for NaN too
        assert (lse.double() - sums).abs().max().item() <= 1e-3
        assert torch.equal(self.pool.view(torch.uint8), before)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_chunks_of_every_head_size_and_group(head_size: int, group: int, random: torch.Generator) -> None:
    Problem(
        random, [(0, 70), (33, 5), (128, 128), (100, 45), (15, 1)], heads=group, kv_heads=1, head_size=head_size
    ).check()


@pytest.mark.parametrize("block_tokens", [16, 32, 48, 128, 256])
def test_chunks_over_every_block_size(block_tokens: int, random: torch.Generator) -> None:
    Problem(random, [(0, 60), (130, 3), (250, 20)], block_tokens=block_tokens, head_size=64).check()


@pytest.mark.parametrize("window", [1, 2, 16, 100, 128, 129, 4096])
def test_chunks_see_the_newest_keys_of_a_window_only(window: int, random: torch.Generator) -> None:
    Problem(random, [(0, 150), (333, 40), (100, 1)], heads=2, kv_heads=1, head_size=64).check(window)


@pytest.mark.parametrize(("window", "head_size"), [(None, 128), (77, 64)])
def test_five_chunks_of_any_lengths(window: int | None, head_size: int, random: torch.Generator) -> None:
    counts = torch.randint(1, 301, (5,), device=random.device, generator=random).tolist()
    prefixes = torch.randint(0, 501, (5,), device=random.device, generator=random).tolist()
    chunks = list(zip(prefixes, counts, strict=True))
    print(chunks)
    Problem(random, chunks, heads=2, kv_heads=1, head_size=head_size).check(window)


def test_chunks_of_all_lengths_up_to_three_hundred(random: torch.Generator) -> None:
    Problem(random, [(7 * count % 500, count) for count in range(1, 301)], heads=8, kv_heads=2).check()


def test_a_long_prompt_in_one_chunk(random: torch.Generator) -> None:
    Problem(random, [(0, 5000), (1000, 3000)], heads=8, kv_heads=2).check()
    Problem(random, [(0, 5000), (1000, 3000)], heads=8, kv_heads=2).check(1000)


@pytest.mark.parametrize(("window", "head_size"), [(None, 128), (1100, 64)])
def test_few_tokens_after_long_prefixes_are_cut_along_the_keys(
    window: int | None, head_size: int, random: torch.Generator
) -> None:
    # Rows 1,144 to 1,151 see nothing of the last tile.
    Problem(random, [(1144, 20), (0, 10), (1500, 3)], heads=2, kv_heads=1, head_size=head_size).check(window)


@pytest.mark.parametrize("window", [None, 150])
def test_parts_of_which_some_rows_see_nothing(
    window: int | None, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_tiles, "_LEAST_TILES", 1)
    Problem(random, [(230, 60)], heads=1, kv_heads=1, head_size=64).check(window)


def test_few_tokens_after_very_long_prefixes(random: torch.Generator) -> None:
    Problem(random, [(30000, 64), (17000, 1), (100, 40)], heads=32, kv_heads=8).check()


def test_more_items_than_thread_blocks(random: torch.Generator) -> None:
    Problem(random, [(0, 40), (5, 33), (120, 70)], heads=16, kv_heads=4, head_size=64).check()


def test_large_scores_of_chunks_lose_no_winner(random: torch.Generator) -> None:
    problem = Problem(random, [(500, 60)], heads=2, kv_heads=1)
    problem.q *= 100  # scores up to 1,000, of which all but the largest weigh nothing
    got, (expected, _) = problem.run(), problem.expected()
    assert (got.double() - expected).abs().max() < 0.05


def test_chunks_scores_far_below_zero_still_sum_to_one(random: torch.Generator) -> None:
    problem = Problem(random, [(0, 40)], heads=2, kv_heads=1)
    problem.q.fill_(-1000)
    blocks = problem.tables[0, :3].long()
    problem.pool[blocks, LAYER, 0] = 1000.0
    problem.pool[blocks, LAYER, 1] = 3.0
    assert (problem.run() == 3).all()


def test_chunk_queries_may_be_a_slice_of_a_wider_product(random: torch.Generator) -> None:
    problem = Problem(random, [(10, 50), (0, 60)], head_size=64)
    wide = torch.cat([problem.q, torch.full_like(problem.q, float("nan"))], 1)
    assert torch.equal(problem.run(q=wide[:, : problem.q.shape[1]]), problem.run())


def test_a_chunk_s_answer_does_not_depend_on_its_neighbours(random: torch.Generator) -> None:
    problem = Problem(random, [(100, 45), (0, 7), (30, 40)], head_size=64)
    together = problem.run()
    spoilt = problem.q.clone()
    spoilt[problem.starts[0] : problem.starts[1]] = float("nan")
    spoilt[problem.starts[2] :] = float("nan")
    mine = slice(problem.starts[1], problem.starts[2])
    assert torch.equal(problem.run(q=spoilt)[mine], together[mine])


def test_one_plan_serves_all_layers_and_every_run(random: torch.Generator) -> None:
    problem = Problem(random, [(20, 60), (0, 30)], head_size=64)
    plan = plan_prefill(problem.pool, problem.tables, problem.starts, problem.lens, {None, 20})
    for window in (None, 20, None):
        got = paged_prefill_attention(
            problem.q, problem.pool, LAYER, problem.tables, problem.starts, problem.lens, 64**-0.5, window, plan
        )
        assert torch.equal(got, problem.run(window))


def test_a_captured_launch_follows_the_tables_of_its_replay(random: torch.Generator) -> None:
    problem = Problem(random, [(100, 60), (0, 200)])
    expected = problem.run()
    tables = problem.tables.clone()
    arguments = (problem.pool, problem.tables, problem.starts, problem.lens)
    plan = plan_prefill(*arguments, {None})
    out = torch.empty_like(problem.q)

    def work() -> None:
        scale = problem.q.shape[-1] ** -0.5
        paged_prefill_attention(problem.q, problem.pool, LAYER, *arguments[1:], scale, None, plan, out)

    work()  # the plan's items reach the device before the capture
    problem.tables.copy_(tables.flip(0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    problem.tables.copy_(tables)
    graph.replay()
    assert torch.equal(out, expected)


def test_nothing_waits_for_the_gpu(random: torch.Generator) -> None:
    problem = Problem(random, [(100, 60), (0, 200)])
    expected = problem.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        arguments = (problem.tables, problem.starts, problem.lens)
        plan = plan_prefill(problem.pool, *arguments, {None})
        got = paged_prefill_attention(problem.q, problem.pool, LAYER, *arguments, 128**-0.5, None, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)


def test_chunks_in_a_pool_past_two_to_the_31_elements(random: torch.Generator) -> None:
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of GPU memory")
    problem = Problem(random, [(40, 30)], heads=4, kv_heads=2)
    num_blocks = 2**32 // problem.pool[0].numel() + 100
    big = torch.empty(num_blocks, *problem.pool.shape[1:], dtype=torch.bfloat16, device=random.device)
    count = -(-70 // 16)
    far = torch.arange(big.shape[0] - count, big.shape[0], device=random.device)
    big[far] = problem.pool[problem.tables[0, :count].long()]
    expected = problem.run()
    problem.pool, problem.tables = big, far.to(torch.int32)[None].contiguous()
    assert torch.equal(problem.run(), expected)
