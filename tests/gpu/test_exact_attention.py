"""Exact attention: a token's result is bit for bit the same in a chunk of any length, beside any others, and alone."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from baton.kernels import prefill_tiles
from baton.kernels.paged_attention import paged_decode_attention, plan_decode
from baton.kernels.prefill_attention import paged_prefill_attention, plan_prefill

from .test_prefill_attention import LAYER, Problem


def in_chunks(problem: Problem, cuts: list[tuple[int, int, int]], window: int | None) -> Tensor:
    """Of (sequence, first token, the one past the last), all in one step.    -> [T, H, D], in the order of `cuts`"""
    starts = [0]
    for _, begin, end in cuts:
        starts.append(starts[-1] + end - begin)
    ends = [end for _, _, end in cuts]
    tables = problem.tables[[sequence for sequence, _, _ in cuts]]
    plan = plan_prefill(problem.pool, tables, starts, ends, {window}, exact=True)
    scale = problem.q.shape[2] ** -0.5
    return paged_prefill_attention(
        rows_of(problem, problem.q, cuts), problem.pool, LAYER, tables, starts, ends, scale, window, plan=plan
    )


def rows_of(problem: Problem, of: Tensor, cuts: list[tuple[int, int, int]]) -> Tensor:
    parts = [of[problem.starts[sequence] + begin : problem.starts[sequence] + end] for sequence, begin, end in cuts]
    return torch.cat(parts)


def alone(problem: Problem, tokens: list[tuple[int, int]], window: int | None) -> Tensor:
    """Of (sequence, token), as these decode in one step, between two rows of nobody.    -> [S, H, D]"""
    device = problem.q.device
    lens = torch.tensor([0, *(token + 1 for _, token in tokens), 0], dtype=torch.int32, device=device)
    tables = problem.tables[[0, *(sequence for sequence, _ in tokens), 0]].contiguous()
    plan = plan_decode(problem.pool, tables, lens, {window}, exact=True)
    mine = rows_of(problem, problem.q, [(sequence, token, token + 1) for sequence, token in tokens])
    q = torch.cat((mine[:1], mine, mine[:1]))
    got = paged_decode_attention(q, problem.pool, LAYER, tables, lens, q.shape[2] ** -0.5, window, plan=plan)
    return got[1:-1]


@pytest.mark.parametrize(("heads", "head_size", "window"), [(4, 128, None), (7, 64, None), (4, 64, 300), (1, 64, 100)])
@pytest.mark.parametrize("piece_tiles", [1, 2, 16])
def test_a_token_s_result_is_the_same_in_any_chunk_and_alone(
    heads: int,
    head_size: int,
    window: int | None,
    piece_tiles: int,
    random: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill_tiles, "_PIECE_TILES", piece_tiles)
    lengths = [700, 129, 1, 300]
    problem = Problem(random, [(0, length) for length in lengths], heads=heads, kv_heads=1, head_size=head_size)
    whole = in_chunks(problem, [(index, 0, length) for index, length in enumerate(lengths)], window)
    expected, _ = problem.expected(window)
    largest = max(kv[1].abs().max().item() for kv in problem.kv)
    assert (whole.double() - expected).abs().max().item() <= 2**-7 * largest
    for _ in range(4):
        cuts = []
        for index, length in enumerate(lengths):
            points = torch.randint(0, length + 1, (3,), device=random.device, generator=random).tolist()
            ends = sorted({0, length, *points})
            cuts += [(index, begin, end) for begin, end in pairwise(ends)]
        order = torch.randperm(len(cuts), device=random.device, generator=random).tolist()
        for some in (order, order[: len(order) // 2]):
            chosen = [cuts[at] for at in some]
            print(chosen)
            assert torch.equal(in_chunks(problem, chosen, window), rows_of(problem, whole, chosen))
    tokens = [(0, 699), (0, 698), (0, 0), (1, 127), (1, 128), (2, 0), (3, 255), (3, 256), (0, 383), (0, 384)]
    for some in (tokens, tokens[:1], tokens[3:6]):
        chosen = [(sequence, token, token + 1) for sequence, token in some]
        assert torch.equal(alone(problem, some, window), rows_of(problem, whole, chosen))


def test_what_is_left_to_merge_is_bounded(random: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_tiles, "_PIECE_TILES", 1)
    problem = Problem(random, [(300, 90), (0, 200), (500, 70)], heads=4, kv_heads=2, head_size=64)
    cuts = [(0, 0, 90), (1, 0, 200), (2, 0, 70)]
    results = []
    for most in (4096, 10, 1):
        monkeypatch.setattr(prefill_tiles, "_EXACT_PARTS", most)
        plan = plan_prefill(problem.pool, problem.tables, problem.starts, problem.lens, {None}, exact=True)
        assert plan.tiles is not None
        works = plan.tiles.work(problem.q, 2, None)
        assert (len(works) > 1) == (most < 4096)
        assert max(work.parts for work in works) <= max(most // 2, 5), "one item alone has five"
        results.append(
            paged_prefill_attention(
                problem.q, problem.pool, LAYER, problem.tables, problem.starts, problem.lens, 0.125, plan=plan
            )
        )
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert rows_of(problem, results[0], cuts).isfinite().all()
