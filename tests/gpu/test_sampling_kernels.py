"""Sampling by the kernels chooses what the torch path on a CPU chooses, which other tests hold against float64."""

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.core.request import Sampling
from baton.engine.device_table import DeviceSamplingTable
from baton.engine.logit_edits import TokenMasks
from baton.engine.logprobs import ranked_logprobs
from baton.engine.ranking import best_first
from baton.engine.sampler import NO_TOKEN, DeviceRows, Sampled, SamplingRows, sample
from baton.engine.sampling_table import SamplingTable
from baton.kernels import sampling
from baton.kernels.sampling import SamplingWorkspace, TokensOut, choose_tokens, token_logprobs

from ..unit.engine.sampling import CPU, INF, PROMPT, edited_row, masks_of, reference_tokens

NAN = float("nan")
SLACK = 4e-6  # of the total: how near to a boundary a number or a cut may be decided either way
DTYPES = [torch.bfloat16, torch.float32]


def some_logits(rows: int, vocab_size: int, random: torch.Generator, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab_size, device=random.device, generator=random) * spread


def dice_of(random: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(1 << 30, (1,), device=random.device, generator=random)))


def random_sampling(dice: np.random.Generator, vocab_size: int) -> Sampling:
    return Sampling(
        max_tokens=99,
        temperature=float(dice.choice([0.0, 0.3, 1.0, 2.5])),
        top_k=int(dice.choice([0, 0, 1, 7, 50, 1500])),
        top_p=float(dice.choice([0.01, 0.6, 0.95, 1.0, 1.0])),
        min_p=float(dice.choice([0.0, 0.0, 0.05, 1.0])),
        seed=int(dice.integers(0, 2**63)) * 2 + 1,
        branch=int(dice.integers(0, 16)),
        repetition_penalty=float(dice.choice([1.0, 1.0, 1.3, 0.8])),
        presence_penalty=float(dice.choice([0.0, 0.0, 0.7])),
        frequency_penalty=float(dice.choice([0.0, 0.0, 0.3, -0.1])),
        logit_bias=((4, 3.25), (7, -100.0), (vocab_size - 1, 2.0)) if dice.random() < 0.3 else (),
        min_tokens=int(dice.choice([0, 0, 20])),
        stop_token_ids=frozenset({7, 9, 30}),
        logprobs=[None, None, 0, 3, 20][dice.integers(0, 5)],
    )


def tables(
    params: Seq[Sampling], answers: Seq[Seq[int]], vocab_size: int, device: torch.device
) -> tuple[DeviceSamplingTable, SamplingTable]:
    there, here = DeviceSamplingTable(len(params), vocab_size, device), SamplingTable(len(params), vocab_size, CPU)
    for row, (one, answer) in enumerate(zip(params, answers, strict=True)):
        there.put(row, one, PROMPT, answer)
        here.put(row, one, PROMPT, answer)
    return there, here


def with_masks(rows: SamplingRows, masks: TokenMasks | None, device: torch.device) -> SamplingRows:
    if masks is None:
        return rows
    return replace(rows, masks=TokenMasks(masks.rows.to(device), masks.bits.to(device)))


def chosen(logits: Tensor, rows: SamplingRows) -> Sampled:
    return sample(logits, rows).to_host().result()


def check(
    found: Sampled,
    expected: Sampled,
    logits: Tensor,
    params: Seq[Sampling],
    answers: Seq[Seq[int]],
    allowed: dict[int, set[int]] | None = None,
) -> int:
    """The same tokens and logprobs, but for numbers that fall on an edge; how many did."""
    ties = 0
    for row, (one, other) in enumerate(zip(found.token_ids.tolist(), expected.token_ids.tolist(), strict=True)):
        if one != other:
            values = edited_row(logits[row].tolist(), params[row], answers[row], (allowed or {}).get(row))
            assert one in reference_tokens(values, params[row], len(answers[row]), SLACK), (row, one, other)
            ties += 1
    assert found.logprobs.keys() == expected.logprobs.keys()
    exact = torch.log_softmax(logits.double(), -1)
    for row, its in found.logprobs.items():
        token = int(found.token_ids[row])
        assert its.logprob == pytest.approx(float(exact[row, token]), abs=1e-5)
        order = torch.sort(logits[row].float(), descending=True, stable=True)[1][: params[row].logprobs].tolist()
        assert [at for at, _ in its.top] == order
        assert [value for _, value in its.top] == pytest.approx(exact[row, order].tolist(), abs=1e-5)
    return ties


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [50, 211, 4096, 9999])
def test_tokens_and_logprobs_are_those_of_the_cpu(vocab_size: int, dtype: torch.dtype, random: torch.Generator) -> None:
    """All parameters, edits and masks at once, ties among the logits, a vocabulary that is no multiple of anything."""
    dice = dice_of(random)
    count = 24
    params = [random_sampling(dice, vocab_size) for _ in range(count)]
    answers = [dice.integers(0, vocab_size, dice.integers(0, 30)).tolist() for _ in params]
    allowed = {row: set(dice.integers(0, vocab_size, 40).tolist()) for row in range(0, count, 3)}
    logits = some_logits(count, vocab_size, random).to(dtype)
    before = logits.clone()
    there, here = tables(params, answers, vocab_size, random.device)
    order, positions = np.arange(count), np.array([len(answer) for answer in answers])
    for masks in (None, masks_of(allowed, vocab_size)):
        found = chosen(logits, with_masks(there.take(order, positions), masks, random.device))
        expected = chosen(logits.cpu().float(), with_masks(here.take(order, positions), masks, CPU))
        assert check(found, expected, logits.cpu(), params, answers, allowed if masks else None) <= 1
    assert torch.equal(logits, before)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 30.0])
def test_flat_and_steep_logits(spread: float, random: torch.Generator) -> None:
    """From all equal, where thousands of tokens lie in one bin, to weights that vanish."""
    vocab_size, dice = 5000, dice_of(random)
    ways: list[dict[str, Any]] = [{}, {"top_k": 1500}, {"top_k": 40, "top_p": 0.5}, {"top_p": 0.9}, {"min_p": 0.5}]
    params = [
        Sampling(max_tokens=9, seed=int(dice.integers(1 << 60)), logprobs=20, **way) for way in ways for _ in "ab"
    ]
    answers: list[list[int]] = [[] for _ in params]
    logits = some_logits(len(params), vocab_size, random, spread).bfloat16()
    there, here = tables(params, answers, vocab_size, random.device)
    order, positions = np.arange(len(params)), np.zeros(len(params), np.int64)
    found, expected = chosen(logits, there.take(order, positions)), chosen(logits.cpu(), here.take(order, positions))
    assert check(found, expected, logits.cpu(), params, answers) <= 1


@pytest.mark.parametrize("vocab_size", [4096, 1 << 18])
def test_of_equal_logits_the_number_picks_by_the_id(vocab_size: int, random: torch.Generator) -> None:
    """And 2^18 whole weights fit."""
    table = DeviceSamplingTable(1, vocab_size, random.device)
    table.put(0, Sampling(max_tokens=9, seed=5), PROMPT)
    taken = table.take(np.zeros(1, np.int64), np.zeros(1, np.int64))
    from baton.engine.draws import uniform

    number = float(uniform(*(np.array([part], np.uint64) for part in (5, 0, 0)))[0])
    logits = torch.full((1, vocab_size), -2.5, dtype=torch.bfloat16, device=random.device)
    assert chosen(logits, taken).token_ids.tolist() == [int(number * vocab_size)]


# Nothing depends on how the work is cut


def outputs(logits: Tensor, rows: SamplingRows, most: int, **given: Any) -> TokensOut:
    its = rows.on_device
    assert its is not None
    out = TokensOut.empty(len(logits), most, logits.device)
    choose_tokens(logits, out, its.workspace, its.tables, its.at, its.positions, more=its.more, **given)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_capacity_and_neighbours_change_no_bit(
    dtype: torch.dtype, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice, vocab_size, count, most = dice_of(random), 9000, 4, 20
    params = [replace(random_sampling(dice, vocab_size), logprobs=most) for _ in range(count)]
    params[0] = replace(params[0], temperature=1.0, top_k=0, top_p=0.95)
    answers = [dice.integers(0, vocab_size, 20).tolist() for _ in params]
    logits = some_logits(count, vocab_size, random, 1.5).to(dtype)
    there, _ = tables(params, answers, vocab_size, random.device)
    order = np.arange(count)
    taken = there.take(order, order * 0 + 20)
    expected = outputs(logits, taken, most)
    for parts in (1, 2, 7):
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "parts_of", lambda *_, parts=parts: parts)
            for capacity in (0, 30, sampling.CANDIDATES):
                found = outputs(logits, taken, most, capacity=capacity)
                for name in TokensOut.__dataclass_fields__:
                    one, other = getattr(found, name), getattr(expected, name)
                    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (name, parts, capacity)
    for row in range(count):
        alone = outputs(logits[row : row + 1], there.take(order[row : row + 1], np.full(1, 20)), most)
        for name in TokensOut.__dataclass_fields__:
            assert torch.equal(getattr(alone, name)[0], getattr(expected, name)[row]), (name, row)


def test_of_nobodys_rows_nothing_is_written(random: torch.Generator) -> None:
    """Whatever their logits are: a padded step's."""
    vocab_size, device = 300, random.device
    params = [Sampling(max_tokens=9, seed=row, logprobs=2, presence_penalty=1.0) for row in range(3)]
    there, _ = tables(params, [[5], [6], [7]], vocab_size, device)
    logits = some_logits(5, vocab_size, random)
    logits[3:] = NAN
    its = there.take(np.arange(3), np.ones(3, np.int64)).on_device
    assert its is not None
    assert its.tables is not None
    at = torch.tensor([0, 1, 2, -1, -1], dtype=torch.int32, device=device)
    positions = torch.tensor([1, 1, 1, 77, 77], dtype=torch.int32, device=device)
    out = TokensOut.empty(5, 2, device)
    for part in (out.token_ids, out.largest, out.own, out.top, out.top_ids):
        part.fill_(-12345)
    choose_tokens(logits, out, its.workspace, its.tables, at, positions, more=True)
    for part in (out.token_ids, out.largest, out.own, out.top, out.top_ids):
        assert (part[3:] == -12345).all()
        assert (part[:3] != -12345).all()
    counts = its.tables.counts.clone()
    sampling.count_tokens(its.tables, at, torch.tensor([5, 8, 9, 5, 5], device=device))
    changed = (its.tables.counts - counts).nonzero().tolist()
    assert changed == [[0, 5], [1, 8], [2, 9]]


# The first best, and logits that are no logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 8, 33, 4096, 20_000])
def test_greedy_rows_get_the_first_best(vocab_size: int, dtype: torch.dtype, random: torch.Generator) -> None:
    rows = SamplingRows(3, on_device=DeviceRows(SamplingWorkspace()))
    for spread in (0.0, 3.0):
        logits = some_logits(3, vocab_size, random, spread).to(dtype)
        logits[1, vocab_size // 2 :] = 50.0
        logits[2, 0] = -0.0
        drawn = sample(logits, rows)
        expected = best_first(logits.cpu().float(), 1)
        assert torch.equal(drawn.token_ids.cpu(), expected[1][:, 0])
        assert torch.equal(drawn.largest.cpu(), expected[0][:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_row_with_nan_or_inf_or_nothing_finite_gets_no_token(
    with_mask: bool, dtype: torch.dtype, random: torch.Generator
) -> None:
    vocab_size, device = 200, random.device
    given: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 5},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"repetition_penalty": 1e-38, "logit_bias": ((20, -100.0), (21, 100.0))},
    ]
    params = [Sampling(max_tokens=9, seed=4, logprobs=1, **one) for one in given]
    there, _ = tables(params, [[] for _ in params], vocab_size, device)
    masks = masks_of({row: {5, 20} for row in range(len(params))}, vocab_size) if with_mask else None
    rows = with_masks(there.take(np.arange(len(params)), np.zeros(len(params))), masks, device)
    fine = some_logits(len(params), vocab_size, random).to(dtype)
    expected = chosen(fine, rows).token_ids.tolist()
    assert NO_TOKEN not in expected
    for bad in (NAN, -NAN, INF):
        for place in (0, 20, vocab_size - 1):
            logits = fine.clone()
            logits[[1, 3], place] = bad
            drawn = sample(logits, rows)
            assert 0 <= int(drawn.token_ids.min()) <= int(drawn.token_ids.max()) < vocab_size, "the next step reads it"
            found = drawn.to_host().result()
            assert found.token_ids.tolist() == [NO_TOKEN if row in (1, 3) else expected[row] for row in range(5)]
            assert np.isnan(found.logprobs[1].logprob)
    nothing = torch.full_like(fine, -INF)
    assert chosen(nothing, rows).token_ids.tolist() == [NO_TOKEN] * 5
    nothing[:, 20] = -300.0
    assert chosen(nothing, rows).token_ids.tolist() == [20] * 5


def test_a_mask_that_leaves_nothing_gives_no_token_and_edits_alone_never_do(random: torch.Generator) -> None:
    vocab_size, device = 64, random.device
    params = [
        Sampling(max_tokens=9, temperature=temperature, min_tokens=3, stop_token_ids=stops)
        for temperature in (0.0, 1.0)
        for stops in (frozenset({8}), frozenset(range(vocab_size)))
    ]
    there, _ = tables(params, [[]] * 4, vocab_size, device)
    logits, order = some_logits(4, vocab_size, random), np.arange(4)
    for allowed in (set(), {8}):
        masks = masks_of(dict.fromkeys(range(4), allowed), vocab_size)
        found = chosen(logits, with_masks(there.take(order, order * 0), masks, device)).token_ids
        assert found.tolist() == [NO_TOKEN] * 4
    assert (chosen(logits, there.take(order, order * 0)).token_ids >= 0).all()
    masks = masks_of({0: {8, 9}, 2: {9}}, vocab_size)
    assert chosen(logits, with_masks(there.take(order, order * 0), masks, device)).token_ids[[0, 2]].tolist() == [9, 9]


# What the tables learn


def test_penalties_follow_the_answer_without_the_host(random: torch.Generator) -> None:
    """Steps of a batch; the CPU's table is told of each token, the device's learns it from what was chosen."""
    dice, vocab_size, count = dice_of(random), 40, 8
    params = [
        replace(
            random_sampling(dice, vocab_size),
            repetition_penalty=[1.0, 1.3][row % 2],
            frequency_penalty=[0.4, 0.0, -0.2][row % 3],
            min_tokens=[0, 4][row % 2],
        )
        for row in range(count)
    ]
    answers: list[list[int]] = [[] for _ in params]
    there, here = tables(params, answers, vocab_size, random.device)
    order = np.arange(count)
    for step in range(8):
        logits = some_logits(count, vocab_size, random, 1.0)
        if step == 5:  # a row changes hands
            answers[3] = [1, 2, 2]
            for table in (there, here):
                table.put(3, params[3], PROMPT, answers[3])
        positions = np.array([len(answer) for answer in answers])
        taken = there.take(order, positions)
        drawn = sample(logits, taken)
        there.chosen(taken, drawn.token_ids)
        found = drawn.to_host().result()
        expected = chosen(logits.cpu(), here.take(order, positions))
        check(found, expected, logits.cpu(), params, answers)
        for row, token in enumerate(found.token_ids.tolist()):
            answers[row].append(token)
            if row in here.edited_rows:
                here.add(row, token)


# Logprobs of given tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [30, 5001])
def test_logprobs_of_given_tokens(vocab_size: int, dtype: torch.dtype, random: torch.Generator) -> None:
    logits = some_logits(6, vocab_size, random).to(dtype)
    logits[4] = 1.0  # all tie
    logits[5] = -INF
    logits[5, 9] = 2.0
    token_ids = torch.tensor([0, 29, 7, -1, 3, 9], device=random.device)
    exact = torch.log_softmax(logits.double().cpu(), -1)
    for count in (0, 3, 20):
        found = ranked_logprobs(logits, token_ids, count)
        wanted = exact.gather(1, token_ids.clamp(min=0)[:, None].cpu())[:, 0]
        assert torch.allclose(found.own.cpu().double(), wanted, atol=1e-5)
        order = torch.sort(logits.float().cpu(), descending=True, stable=True)[1][:, :count]
        assert torch.equal(found.top_ids.cpu(), order)
        assert torch.allclose(found.top.cpu().double(), exact.gather(1, order), atol=1e-5)


def test_best_logprobs_by_the_slow_path(random: torch.Generator) -> None:
    logits = some_logits(3, 1000, random).bfloat16()
    out = TokensOut.empty(3, 20, logits.device)
    out.token_ids.zero_()
    token_logprobs(logits, out, 20, SamplingWorkspace(), capacity=5)
    order = torch.sort(logits.float(), descending=True, stable=True)[1][:, :20]
    assert torch.equal(out.top_ids, order)


def test_a_captured_step_reads_rows_and_positions_of_its_replay(random: torch.Generator) -> None:
    vocab_size, device = 128_256, random.device
    params = [Sampling(max_tokens=9, seed=row, top_p=0.9, logprobs=5, presence_penalty=0.5) for row in range(16)]
    there, here = tables(params, [[] for _ in params], vocab_size, device)
    logits = some_logits(16, vocab_size, random).bfloat16()
    its = there.take(np.arange(16), np.zeros(16, np.int64)).on_device
    assert its is not None
    assert its.tables is not None
    at = torch.full((16,), -1, dtype=torch.int32, device=device)
    positions, out = torch.zeros_like(at), TokensOut.empty(16, 5, device)

    def work() -> None:
        choose_tokens(logits, out, its.workspace, its.tables, at, positions)
        sampling.count_tokens(its.tables, at, out.token_ids)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    at.copy_(torch.tensor([*range(12), -1, -1, -1, -1]))
    answers: list[list[int]] = [[] for _ in range(12)]
    for step in range(3):
        positions.fill_(step)
        graph.replay()
        tokens = out.token_ids[:12].tolist()
        expected = chosen(logits[:12].cpu(), here.take(np.arange(12), np.full(12, step)))
        check(Sampled(np.array(tokens), True, {}), replace(expected, logprobs={}), logits.cpu(), params, answers)
        for row, token in enumerate(tokens):
            answers[row].append(token)
            here.add(row, token)
