"""Each op's CPU path against its reference in float64."""

import pytest
import torch

from baton.kernels.activation import silu_gate
from baton.kernels.block_copy import gather_blocks, scatter_blocks
from baton.kernels.experts import mix_experts, mix_experts_reference, route
from baton.kernels.linear import add_linear, gated_linear, linear, pack_weight
from baton.kernels.norm import rms_norm, rms_norm_reference
from baton.kernels.paged_attention import Workspace, paged_attention_reference, paged_decode_attention, plan_decode
from baton.kernels.prefill_attention import paged_prefill_attention
from baton.kernels.rotary import rotary, rotary_reference, signed_sin
from baton.kernels.skinny_linear import skinny_linear_reference
from baton.kernels.write_kv import write_kv

torch.set_num_threads(1)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
N, L, G, H, P, D = 40, 3, 2, 6, 16, 16


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables_for(lens: list[int]) -> torch.Tensor:
    """Different shuffled blocks for each sequence; unused entries name its first block."""
    blocks = torch.randperm(N, generator=torch.Generator().manual_seed(1)).tolist()
    tables = []
    for length in lens:
        mine = [blocks.pop() for _ in range(-(-length // P))]
        tables.append(mine + mine[:1] * (-(-max(lens) // P) - len(mine)))
    return torch.tensor(tables, dtype=torch.int32)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[found.dtype], atol=TOLERANCE[found.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("lens", [[1], [33], [17, 17], [1, 16, 17, 100, 40]], ids=str)
def test_decode_attention_sees_its_own_context_and_no_more(
    lens: list[int], window: int | None, dtype: torch.dtype
) -> None:
    pool, q, tables = (
        random(N, L, 2, G, P, D, dtype=dtype),
        random(len(lens), H, D, dtype=dtype, seed=1),
        tables_for(lens),
    )
    context_lens = torch.tensor(lens, dtype=torch.int32)
    plan = plan_decode(pool, tables, context_lens, {window}, Workspace())
    for layer in range(L):
        found = paged_decode_attention(q, pool, layer, tables, context_lens, 0.3, window, plan=plan)
        assert torch.equal(found, paged_decode_attention(q, pool, layer, tables, context_lens, 0.3, window))
        for row, length in enumerate(lens):
            asked = (q[row : row + 1].double(), pool.double(), layer, tables[row], length, 0.3, window)
            assert_close(found[row : row + 1], paged_attention_reference(*asked))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("lens", [[33], [17, 17], [1, 16, 17, 100, 40]], ids=str)
def test_nan_that_an_earlier_holder_left_in_a_block_reaches_nobody(lens: list[int], window: int | None) -> None:
    pool, tables, context_lens = random(N, L, 2, G, P, D), tables_for(lens), torch.tensor(lens, dtype=torch.int32)
    spoilt = torch.full_like(pool, float("nan"))
    for table, length in zip(tables.tolist(), lens, strict=True):
        for position in range(length):
            place = (table[position // P], slice(None), slice(None), slice(None), position % P)
            spoilt[place] = pool[place]
    q = random(len(lens), H, D, seed=1)
    clean = paged_decode_attention(q, pool, 1, tables, context_lens, 0.3, window)
    assert torch.equal(paged_decode_attention(q, spoilt, 1, tables, context_lens, 0.3, window), clean)
    starts = list(range(len(lens) + 1))  # the last token of each as a chunk of its own
    clean = paged_prefill_attention(q, pool, 1, tables, starts, lens, 0.3, window)
    assert torch.equal(paged_prefill_attention(q, spoilt, 1, tables, starts, lens, 0.3, window), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_prefill_attention_is_causal_after_each_cached_prefix(window: int | None, dtype: torch.dtype) -> None:
    chunks, lens = [1, 20, 7, 64, 1], [1, 20, 50, 100, 33]
    starts = [0, 1, 21, 28, 92, 93]
    pool, q, tables = random(N, L, 2, G, P, D, dtype=dtype), random(93, H, D, dtype=dtype, seed=1), tables_for(lens)
    for layer in range(L):
        found = paged_prefill_attention(q, pool, layer, tables, starts, lens, 0.3, window)
        for row, (count, length) in enumerate(zip(chunks, lens, strict=True)):
            mine = slice(starts[row], starts[row] + count)
            asked = (q[mine].double(), pool.double(), layer, tables[row], length, 0.3, window)
            assert_close(found[mine], paged_attention_reference(*asked))


def test_written_kv_lies_where_the_layout_says_and_nothing_else_changes() -> None:
    pool, k, v = random(N, L, 2, G, P, D), random(5, G, D, seed=1), random(5, G, D, seed=2)
    slots = torch.tensor([3 * P + 2, 3 * P + 3, 0, 39 * P + 15, 7 * P])
    expected = pool.clone()
    for token, slot in enumerate(slots.tolist()):
        expected[slot // P, 1, 0, :, slot % P] = k[token]
        expected[slot // P, 1, 1, :, slot % P] = v[token]
    write_kv(k, v, pool, 1, slots)
    assert torch.equal(pool, expected)


def test_blocks_gathered_and_scattered_are_the_same_bytes() -> None:
    pool = torch.randint(0, 256, (20, 96), dtype=torch.uint8)
    ids, out = torch.tensor([7, 0, 19], dtype=torch.int32), torch.empty(3, 96, dtype=torch.uint8)
    gather_blocks(pool, ids, out)
    assert torch.equal(out, pool[ids.long()])
    target = torch.zeros_like(pool)
    scatter_blocks(target, ids, out)
    expected = torch.zeros_like(pool)
    expected[ids.long()] = pool[ids.long()]
    assert torch.equal(target, expected)


def test_block_copies_refuse_blocks_of_another_size() -> None:
    pool = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(AssertionError):
        gather_blocks(pool, torch.tensor([0]), torch.empty(1, 16, dtype=torch.uint8))


def test_rms_norm_is_the_formula() -> None:
    x, weight = random(7, 32), random(32, seed=1)
    assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x.double(), weight.double(), 1e-5))


def test_rotary_turns_pairs_as_complex_numbers() -> None:
    x, angles = random(9, 4, D), random(9, D // 2, seed=1) * 10
    both = torch.cat((angles, angles), -1)
    found = rotary(x, both.cos()[:, None], signed_sin(both.sin())[:, None])
    assert_close(found, rotary_reference(x.double(), angles.double()))


def test_silu_gate_takes_the_gate_from_the_first_half() -> None:
    x = random(5, 24)
    gate, up = x.double().chunk(2, -1)
    assert_close(silu_gate(x), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_packed_weight_gives_the_product_of_the_plain_one(tokens: int, with_bias: bool, dtype: torch.dtype) -> None:
    x, weight = random(tokens, 48, dtype=dtype), random(80, 48, dtype=dtype, seed=1)
    bias = random(80, dtype=dtype, seed=2) if with_bias else None
    with torch.inference_mode():
        found = linear(x, pack_weight(weight), bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_folded_into_a_product_changes_nothing_on_a_cpu(tokens: int, dtype: torch.dtype) -> None:
    x, weight = random(tokens, 48, dtype=dtype), random(80, 48, dtype=dtype, seed=1) / 7
    bias, stream = (random(n, dtype=dtype, seed=n) for n in (80, tokens * 80))
    stream = stream.view(tokens, 80)
    doubles = (x.double(), weight.double(), bias.double())
    with torch.inference_mode():
        packed = pack_weight(weight)
        gated = gated_linear(x, packed, bias)
        added = add_linear(stream.clone(), x, packed, bias)
    for found, expected in (
        (gated, skinny_linear_reference(*doubles, gate=True)),
        (added, skinny_linear_reference(*doubles, add=stream.double())),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (1, 8, 2), (7, 3, 3), (50, 16, 4)], ids=str)
def test_experts_are_mixed_by_their_shares(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    hidden, inner = 24, 12
    x, gate_up = random(tokens, hidden, dtype=dtype), random(experts, 2 * inner, hidden, dtype=dtype, seed=1) / 5
    down = random(experts, hidden, inner, dtype=dtype, seed=2) / 5
    shares, chosen = route(random(tokens, experts, dtype=dtype, seed=3), top_k, normalise=True)
    found = mix_experts(x, gate_up, down, shares, chosen)
    assert_close(found, mix_experts_reference(x.double(), gate_up.double(), down.double(), shares, chosen))


def test_a_token_goes_through_its_own_experts_whatever_its_neighbours_choose() -> None:
    x, gate_up, down = random(6, 8), random(4, 10, 8, seed=1), random(4, 8, 5, seed=2)
    shares, chosen = route(random(6, 4, seed=3), 2, normalise=False)
    mixed = mix_experts(x, gate_up, down, shares, chosen)
    for token in range(6):
        alone = mix_experts(x[token : token + 1], gate_up, down, shares[token : token + 1], chosen[token : token + 1])
        torch.testing.assert_close(mixed[token : token + 1], alone)


def test_routes_are_the_largest_of_the_softmax_over_all() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    shares, chosen = route(logits, 2, normalise=False)
    assert chosen.tolist() == [[1, 2]]
    torch.testing.assert_close(shares, logits.softmax(-1)[:, 1:3])
    torch.testing.assert_close(route(logits, 2, normalise=True)[0], logits[:, 1:3].softmax(-1))
