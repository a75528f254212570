"""Decode attention equals a float64 reference, reads nothing it should not, and writes all it should."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.kernels.paged_attention import CUDA_HEAD_SIZES, paged_decode_attention

# Largest error allowed, relative to the largest value of V: bfloat16 keeps 8 bits of the result, float32 sums in 24.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 4e-6}
NUM_LAYERS, LAYER = 2, 1


class Problem:
    """Random sequences in a pool whose every other place holds NaN."""

    def __init__(
        self,
        random: torch.Generator,
        lens: list[int],
        *,
        heads: int = 8,
        kv_heads: int = 2,
        head_size: int = 128,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        tokens: int = 1,
    ) -> None:
        """tokens: that ask, of each sequence."""
        self.tokens = tokens
        device = random.device
        blocks_of = [-(-length // block_tokens) for length in lens]
        num_blocks = sum(blocks_of) + 3
        shape = (num_blocks, NUM_LAYERS, 2, kv_heads, block_tokens, head_size)
        self.pool = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.q = torch.randn(len(lens) * tokens, heads, head_size, device=device, generator=random).to(dtype)
        self.lens = lens
        self.context_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        # Entries past a context name no block that exists.
        self.tables = torch.full((len(lens), max(blocks_of) + 2), 2**31 - 1, dtype=torch.int32, device=device)
        self.kv = []  # [2, G, length, D] of each sequence
        order = torch.randperm(num_blocks, device=device, generator=random).to(torch.int32)
        for row, (length, count) in enumerate(zip(lens, blocks_of, strict=True)):
            kv = torch.randn(2, kv_heads, length, head_size, device=device, generator=random).to(dtype)
            self.kv.append(kv)
            mine, order = order[:count], order[count:]
            self.tables[row, :count] = mine
            for index, block in enumerate(mine.tolist()):
                part = kv[:, :, index * block_tokens : (index + 1) * block_tokens]
                self.pool[block, LAYER, :, :, : part.shape[2]] = part

    def run(self, window: int | None = None, q: Tensor | None = None, **scores: Any) -> Tensor:
        out = torch.full_like(self.q, float("nan"))
        asked = self.q if q is None else q
        scale = self.q.shape[-1] ** -0.5
        got = paged_decode_attention(
            asked, self.pool, LAYER, self.tables, self.context_lens, scale, window, out, tokens=self.tokens, **scores
        )
        assert got is out
        return out

    def expected(self, window: int | None = None, soft_cap: float = 0.0, slopes: Tensor | None = None) -> Tensor:
        """In float64, query by query, written down as the definition has it."""
        rows = []
        for row, q in enumerate(self.q.double()):
            kv, length = self.kv[row // self.tokens], self.lens[row // self.tokens]
            asks = length - self.tokens + row % self.tokens
            first = 0 if window is None else max(0, asks + 1 - window)
            seen = kv[:, :, first : asks + 1].double().repeat_interleave(q.shape[0] // kv.shape[1], 1)
            scores = torch.einsum("hd,hcd->hc", q, seen[0]) / math.sqrt(q.shape[1])
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            if slopes is not None:
                scores = scores + slopes[:, None].double() * (torch.arange(first, asks + 1, device=q.device) - asks)
            rows.append(torch.einsum("hc,hcd->hd", scores.softmax(-1), seen[1]))
        return torch.stack(rows)

    def check(self, window: int | None = None, **scores: Any) -> None:
        before = self.pool.view(torch.uint8).clone()
        error = (self.run(window, **scores).double() - self.expected(window, **scores)).abs().max().item()
        largest = max(kv[1].abs().max().item() for kv in self.kv)
        assert error <= TOLERANCE[self.q.dtype] * largest, (error, largest)  # false for NaN too
        assert torch.equal(self.pool.view(torch.uint8), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("head_size", CUDA_HEAD_SIZES)
def test_every_head_size_and_group_gives_the_reference(
    head_size: int, group: int, dtype: torch.dtype, random: torch.Generator
) -> None:
    Problem(random, [77, 1, 300, 16], heads=2 * group, head_size=head_size, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_tokens", [16, 32, 48, 64, 128, 256])
def test_every_block_size_gives_the_reference(block_tokens: int, dtype: torch.dtype, random: torch.Generator) -> None:
    lens = [1, 15, 16, 17, 47, 48, 49, 255, 256, 257, 1000]
    Problem(random, lens, block_tokens=block_tokens, head_size=64, dtype=dtype).check()


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 100, 128, 4096])
def test_a_window_shows_the_newest_keys_only(window: int, head_size: int, random: torch.Generator) -> None:
    lens = [1, 2, 16, 17, 99, 100, 101, 128, 777, 2000]
    Problem(random, lens, head_size=head_size, dtype=torch.float32).check(window)
    Problem(random, lens, head_size=head_size).check(window)


@pytest.mark.parametrize("tokens", [2, 3, 5, 8])
@pytest.mark.parametrize(("heads", "head_size"), [(2, 128), (8, 128), (8, 64), (14, 96), (4, 256)])
@pytest.mark.parametrize("window", [None, 3, 40])
def test_several_tokens_of_a_sequence_see_what_came_before_each(
    tokens: int, heads: int, head_size: int, window: int | None, random: torch.Generator
) -> None:
    Problem(random, [8, 9, 16, 17, 130, 700], heads=heads, head_size=head_size, tokens=tokens).check(window)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_may_be_capped_or_fall_with_the_distance(
    dtype: torch.dtype, tokens: int, random: torch.Generator
) -> None:
    problem = Problem(random, [5, 300, 64], tokens=tokens, dtype=dtype)
    problem.q *= 4  # so that the cap bites
    problem.check(soft_cap=2.0)
    slopes = torch.rand(8, device=random.device, generator=random) / 4
    problem.check(slopes=slopes)
    problem.check(50, slopes=slopes, soft_cap=3.0)


def test_many_tiles_are_handed_out_to_whoever_is_done(random: torch.Generator) -> None:
    problem = Problem(random, [20000, 3, 9000, 17], heads=4, kv_heads=4, head_size=64)
    first = problem.run()
    problem.check()
    for _ in range(3):  # whoever computed a part: the result is the same
        assert torch.equal(problem.run(), first)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (16, 2), (32, 2), (5, 5)])
def test_a_sequence_of_many_parts_is_merged(heads: int, kv_heads: int, random: torch.Generator) -> None:
    Problem(random, [30000, 1, 2500], heads=heads, kv_heads=kv_heads, head_size=64).check()
    Problem(random, [5000], heads=heads, kv_heads=kv_heads).check()


def test_all_lengths_up_to_three_hundred(random: torch.Generator) -> None:
    Problem(random, list(range(1, 301)), heads=4, head_size=64, dtype=torch.float32).check()
    Problem(random, list(range(1, 301)), heads=4, head_size=80).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_contexts(dtype: torch.dtype, random: torch.Generator) -> None:
    Problem(random, [32768, 4097, 9999], heads=32, kv_heads=8, dtype=dtype).check()


def test_many_sequences_of_many_lengths(random: torch.Generator) -> None:
    lens = torch.randint(1, 600, (256,), device=random.device, generator=random).tolist()
    Problem(random, lens, heads=32, kv_heads=8).check()


def test_large_scores_neither_overflow_nor_lose_the_winner(random: torch.Generator) -> None:
    problem = Problem(random, [500, 33], dtype=torch.float32)
    problem.q *= 300
    got, expected = problem.run(), problem.expected()
    assert (
        got.double() - expected
    ).abs().max() < 1e-2  # of values up to 4; scores reach 1,000, where float32 steps by 6e-5


def test_scores_far_below_zero_still_sum_to_one(random: torch.Generator) -> None:
    problem = Problem(random, [40], heads=2, dtype=torch.float32)
    problem.q.fill_(-1000)
    blocks = problem.tables[0, :3].long()
    problem.pool[blocks, LAYER, 0] = 1000.0
    problem.pool[blocks, LAYER, 1] = 3.0
    assert torch.allclose(problem.run(), torch.tensor(3.0, device=random.device))


def test_an_empty_row_is_padding_and_gives_zeros(random: torch.Generator) -> None:
    problem = Problem(random, [20, 30, 40])
    whole = problem.run()
    problem.context_lens[1] = 0
    got = problem.run()
    assert (got[1] == 0).all()
    assert torch.equal(got[[0, 2]], whole[[0, 2]])


def test_queries_may_be_a_slice_of_a_wider_product(random: torch.Generator) -> None:
    problem = Problem(random, [50, 60])
    wide = torch.cat([problem.q, torch.full_like(problem.q, float("nan"))], 1)
    assert torch.equal(problem.run(q=wide[:, : problem.q.shape[1]]), problem.run())


def test_a_sequence_s_answer_does_not_depend_on_its_batch(random: torch.Generator) -> None:
    problem = Problem(random, [100, 2000, 3, 640])
    together = problem.run()
    for row in range(4):
        alone = paged_decode_attention(
            problem.q[row : row + 1],
            problem.pool,
            LAYER,
            problem.tables[row : row + 1],
            problem.context_lens[row : row + 1],
            problem.q.shape[-1] ** -0.5,
        )
        assert torch.equal(alone[0], together[row])


def test_a_captured_launch_reads_the_tables_of_its_replay(random: torch.Generator) -> None:
    problem = Problem(random, [64, 200])
    expected = problem.run()
    lens = problem.context_lens.clone()
    problem.context_lens.fill_(1)
    problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode_attention(
            problem.q, problem.pool, LAYER, problem.tables, problem.context_lens, problem.q.shape[-1] ** -0.5
        )
    problem.context_lens.copy_(lens)
    graph.replay()
    assert torch.equal(out, expected)


def test_a_pool_past_two_to_the_31_elements(random: torch.Generator) -> None:
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of GPU memory")
    problem = Problem(random, [70], heads=4, kv_heads=2, head_size=128)
    num_blocks = 2**32 // problem.pool[0].numel() + 100
    big = torch.empty(num_blocks, *problem.pool.shape[1:], dtype=torch.bfloat16, device=random.device)
    count = -(-70 // 16)
    far = torch.arange(big.shape[0] - count, big.shape[0], device=random.device)
    big[far] = problem.pool[problem.tables[0, :count].long()]
    expected = problem.run()
    problem.pool, problem.tables = big, far.to(torch.int32)[None].contiguous()
    assert torch.equal(problem.run(), expected)
