"""Plans carried out, against the specification that copies token by token."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.ids import BlockId
from baton.kv_transfer import reshape
from baton.kv_transfer.cuts import Cut, brought, completed, next_source_parcel, tokens_of
from baton.kv_transfer.plan import Side, plan_hand_over
from baton.kv_transfer.reshape import ROUNDING, Held, carry_out

from .shapes import DTYPES, a_side, canary_pools, same_bits, scattered, write_by_token

TPS = (1, 2, 4, 8)
BLOCKS = (16, 32, 64, 128)
MODEL_LAYERS = 6


@dataclass(frozen=True)
class Setting:
    """A source that has computed a prompt, and a reader whose pools are full of canaries."""

    source: Side
    reader: Side
    kv: torch.Tensor  # [T, all layers, 2, G, D] in the source's dtype
    there: Held
    here: Held

    @classmethod
    def of(cls, source: Side, reader: Side, prompt: int, kv: torch.Tensor | None = None, seed: int = 0) -> "Setting":
        shape = (prompt, MODEL_LAYERS, 2, source.geometry.num_kv_heads, source.geometry.head_size)
        if kv is None:
            kv = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        kv = kv.reshape(shape).to(DTYPES[source.geometry.dtype])
        held = []
        for at, side in enumerate((source, reader)):
            blocks = -(-prompt // side.geometry.block_tokens)
            size = blocks + 3
            held.append(Held(canary_pools(side, size), scattered(blocks, size, seed + at)))
        there, here = held
        write_by_token(there.pools, source, list(there.table), kv, range(prompt))  # type: ignore[arg-type]
        return cls(source, reader, kv, there, here)

    def expected(self, tokens: list[int]) -> list[torch.Tensor]:
        """The reader's pools as they should be, for layers that both sides hold."""
        dtype = self.reader.geometry.dtype
        pools = canary_pools(self.reader, len(self.here.pools[0]))
        whole = [pool.clone() for pool in pools]
        numbers = self.kv
        if dtype == "float8_e4m3fn":
            numbers = numbers.float().clamp(-448, 448)
        numbers = numbers.to(DTYPES[dtype])
        write_by_token(whole, self.reader, list(self.here.table), numbers, tokens)  # type: ignore[arg-type]
        first = self.reader.geometry.first_layer
        common = sorted(set(self.source.geometry.layers) & set(self.reader.geometry.layers))
        for pool, full in zip(pools, whole, strict=True):
            local = slice(common[0] - first, common[-1] + 1 - first)
            pool[:, local] = full[:, local]
        return pools

    def check(self, tokens: list[int]) -> None:
        """Just these tokens have come: bit for bit, each in every replica, and no other byte has changed."""
        for pool, expected in zip(self.here.pools, self.expected(tokens), strict=True):
            assert same_bits(pool, expected)

    def carry_out(self, runs: tuple[range, ...]) -> None:
        before = [pool.clone() for pool in self.there.pools]
        written = carry_out(plan_hand_over(self.source, self.reader), self.there, self.here, runs)
        assert written == sum(map(len, runs)) * self.token_bytes()
        assert all(same_bits(pool, old) for pool, old in zip(self.there.pools, before, strict=True))

    def token_bytes(self) -> int:
        common = set(self.source.geometry.layers) & set(self.reader.geometry.layers)
        heads = sum(map(len, self.reader.rank_heads))
        return len(common) * 2 * heads * self.reader.geometry.head_size * self.here.pools[0].element_size()


def flat(runs: tuple[range, ...]) -> list[int]:
    return [token for run in runs for token in run]


@pytest.mark.parametrize(("source_block", "reader_block"), list(product(BLOCKS, BLOCKS)))
@pytest.mark.parametrize("kv_heads", TPS)
def test_every_pair_of_shapes(kv_heads: int, source_block: int, reader_block: int) -> None:
    """tp 1, 2, 4, 8 on either side; 150 prompt tokens, so that no last block is full, from the 4th on."""
    for source_tp, reader_tp in product(TPS, TPS):
        source = a_side(source_tp, kv_heads, range(3), source_block, head_size=2)
        reader = a_side(reader_tp, kv_heads, range(1, 3), reader_block, head_size=2)
        setting = Setting.of(source, reader, 150, seed=source_tp)
        setting.carry_out((range(3, 150),))
        setting.check(list(range(3, 150)))


GRID_TPS = [(1, 4), (4, 2), (8, 8)]  # with 4 KV heads: split, joined, replicas on both sides
GRID_BLOCKS = [(16, 16), (16, 64), (128, 32), (64, 128)]
GRID_DTYPES = [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float8_e4m3fn")]


@pytest.mark.parametrize("dtypes", GRID_DTYPES, ids="-".join)
@pytest.mark.parametrize("blocks", GRID_BLOCKS, ids=str)
@pytest.mark.parametrize("tps", GRID_TPS, ids=str)
def test_the_grid(tps: tuple[int, int], blocks: tuple[int, int], dtypes: tuple[str, str]) -> None:
    """Equal dtypes: bit for bit. Else within what the dtype loses, by float64, for numbers of every size."""
    source, reader = (
        a_side(tp, 4, range(MODEL_LAYERS), block, dtype, head_size=8)
        for tp, block, dtype in zip(tps, blocks, dtypes, strict=True)
    )
    prompt = 311
    sizes = torch.exp2(torch.linspace(-30, 8, prompt)).reshape(-1, 1, 1, 1, 1)
    kv = torch.randn(prompt, MODEL_LAYERS, 2, 4, 8, generator=torch.Generator().manual_seed(1)) * sizes
    setting = Setting.of(source, reader, prompt, kv)
    setting.carry_out((range(prompt),))
    setting.check(list(range(prompt)))
    read = torch.zeros(prompt, MODEL_LAYERS, 2, 4, 8, dtype=torch.float64)
    for pool, held in zip(setting.here.pools, reader.rank_heads, strict=True):
        for token in range(prompt):
            block, at = setting.here.table[token // blocks[1]], token % blocks[1]
            read[token, :, :, held.start : held.stop] = pool[block, :, :, :, at].double()
    exact = setting.kv.double()
    if dtypes[0] == dtypes[1]:
        assert torch.equal(read, exact)
        return
    rounding = ROUNDING[dtypes[1]]
    error = (read - exact.clamp(-rounding.largest, rounding.largest)).abs()
    assert (error <= torch.maximum(rounding.relative * exact.abs(), torch.tensor(rounding.absolute))).all()
    assert error.max() > 0


@st.composite
def settings_and_chunks(draw: st.DrawFn) -> tuple[Setting, set[int], list[int]]:
    kv_heads = draw(st.sampled_from((1, 2, 4)))
    sides = []
    for _ in range(2):
        start = draw(st.integers(0, 2))
        sides.append(
            a_side(
                draw(st.sampled_from((1, 2, 4))),
                kv_heads,
                range(start, draw(st.integers(3, MODEL_LAYERS))),
                draw(st.sampled_from((16, 32, 48, 64, 128))),
                draw(st.sampled_from(list(DTYPES))),
                head_size=2,
            )
        )
    prompt = draw(st.integers(1, 400))
    wanted = draw(st.sets(st.integers(0, (prompt - 1) // sides[1].geometry.block_tokens)))
    ends = draw(st.sets(st.integers(1, prompt), max_size=4)) | {prompt}
    return Setting.of(*sides, prompt, seed=draw(st.integers(0, 99))), wanted, sorted(ends)


@given(settings_and_chunks())
@settings(deadline=None, max_examples=150)
def test_chunk_by_chunk_each_wanted_token_lands_and_nothing_else_is_touched(
    drawn: tuple[Setting, set[int], list[int]],
) -> None:
    setting, wanted, ends = drawn
    prompt = len(setting.kv)
    cut = Cut(
        prompt_tokens=prompt,
        source_block=setting.source.geometry.block_tokens,
        reader_block=setting.reader.geometry.block_tokens,
    )
    announced: set[int] = set()
    before = 0
    come: list[int] = []
    done: list[int] = []
    for computed in ends:
        parcel = next_source_parcel(cut, wanted, list(setting.there.table), before, computed)  # type: ignore[arg-type]
        before = computed
        runs = brought(cut, wanted, parcel.indices)
        only = Held(setting.there.pools, dict(zip(parcel.indices, parcel.blocks, strict=True)))  # all that is announced
        carry_out(plan_hand_over(setting.source, setting.reader), only, setting.here, runs)
        done += completed(cut, wanted, announced, parcel.indices)
        announced.update(parcel.indices)
        come += flat(runs)
        setting.check(come)
    assert come == flat(tokens_of(wanted, cut.reader_block, prompt))
    assert sorted(done) == sorted(wanted)


@given(
    st.integers(1, 200).flatmap(lambda stop: st.tuples(st.integers(0, stop - 1), st.just(stop))),
    st.sampled_from((16, 32, 48)),
    st.sampled_from((16, 64, 24)),
)
@settings(deadline=None)
def test_a_range_may_begin_and_end_inside_a_block(ends: tuple[int, int], source_block: int, reader_block: int) -> None:
    source = a_side(2, 2, range(2), source_block, "bfloat16")
    setting = Setting.of(source, a_side(1, 2, range(2), reader_block, "bfloat16"), 200)
    setting.carry_out((range(*ends),))
    setting.check(list(range(*ends)))


def test_blocks_that_follow_each_other_move_in_one_copy_for_each_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen blocks of 16 tokens into four of 64, all in a row on both sides, from one rank to two."""
    copies: list[tuple[int, ...]] = []
    copyto = np.copyto
    monkeypatch.setattr(np, "copyto", lambda to, what: (copies.append(to.shape), copyto(to, what)))
    source, reader = a_side(1, 2, range(3), 16), a_side(2, 2, range(3), 64)
    setting = Setting.of(source, reader, 256)
    row = Held(setting.there.pools, [BlockId(1 + at) for at in range(16)])
    write_by_token(row.pools, source, list(row.table), setting.kv, range(256))  # type: ignore[arg-type]
    here = Held(setting.here.pools, [BlockId(2 + at) for at in range(4)])
    carry_out(plan_hand_over(source, reader), row, here, (range(256),))
    assert copies == [(4, 4, 3, 2, 1, 16, 4)] * 2
    Setting(source, reader, setting.kv, row, here).check(list(range(256)))


@pytest.mark.parametrize("most", [1, 1 << 11, 5000, 1 << 14])
@pytest.mark.parametrize("blocks", [(16, 64), (64, 16), (16, 16)], ids=str)
def test_what_is_converted_moves_in_small_parts(
    monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int], most: int
) -> None:
    """A unit is 16 tokens x 3 layers x 2 x 4 numbers of float32, 1536 bytes; a large block four of them."""
    monkeypatch.setattr(reshape, "_CONVERTED_BYTES", most)
    copied: list[int] = []
    copy = reshape._copy

    def spy(source: reshape.Numbers, *rest: object) -> None:
        copied.append(source.nbytes)
        copy(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reshape, "_copy", spy)
    source, reader = (a_side(1, 1, range(3), block, dtype) for block, dtype in zip(blocks, DTYPES, strict=False))
    setting = Setting.of(source, reader, 640)
    here, there = (
        Held(held.pools, [BlockId(1 + at) for at in range(640 // block)])
        for held, block in zip((setting.here, setting.there), blocks[::-1], strict=True)
    )
    write_by_token(there.pools, source, list(there.table), setting.kv, range(640))  # type: ignore[arg-type]
    carry_out(plan_hand_over(source, reader), there, here, (range(16, 640),))
    assert max(copied) <= max(most, 1536 * max(blocks) // min(blocks))
    assert sum(copied) == 624 // 16 * 1536
    Setting(source, reader, setting.kv, there, here).check(list(range(16, 640)))


def test_equal_shapes_copy_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[bool] = []
    copyto = np.copyto

    def spy(to: np.ndarray, what: np.ndarray) -> None:  # type: ignore[type-arg]
        copies.append(to.flags.c_contiguous and what.flags.c_contiguous)
        copyto(to, what)

    monkeypatch.setattr(np, "copyto", spy)
    side = a_side(2, 4, range(2), 32, "bfloat16")
    setting = Setting.of(side, side, 64)
    there = Held(setting.there.pools, [BlockId(3), BlockId(1)])
    write_by_token(there.pools, side, list(there.table), setting.kv, range(64))  # type: ignore[arg-type]
    carry_out(plan_hand_over(side, side), there, setting.here, (range(64),))
    assert copies == [True] * 4  # two ranks, two blocks
    Setting(side, side, setting.kv, there, setting.here).check(list(range(64)))


def some_numbers() -> torch.Tensor:
    """Of every exponent, half-way cases of e4m3 and bfloat16 among them, what is too large, and no numbers."""
    bits = torch.arange(0, 1 << 32, 65_521, dtype=torch.int64).to(torch.int32)
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = exact[~exact.isnan()].sort().values
    halves = (exact[1:] + exact[:-1]) / 2
    special = torch.tensor([0.0, -0.0, 448, 449, 463.9, 464, 465, 1e9, -1e9, torch.inf, -torch.inf, torch.nan])
    bf16_halves = (torch.arange(1, 30000, 77, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    return torch.cat([bits.view(torch.float32), exact, halves, special, bf16_halves])


def nearest_even(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By looking each number up among all that the dtype has: the nearest, of two the one whose last bit is 0."""
    bits = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32)
    bits = bits.to(torch.uint8) if dtype.itemsize == 1 else bits.to(torch.int16)
    values = bits.view(dtype).double()
    there = values.isfinite()
    ordered, order = values[there].sort(stable=True)
    even = (bits[there][order] & 1) == 0
    x = numbers.double().clamp(ordered[0], ordered[-1])
    above = torch.searchsorted(ordered, x).clamp(1, len(ordered) - 1)
    low, high = ordered[above - 1], ordered[above]
    up = (high - x < x - low) | ((high - x == x - low) & even[above] & (low != high))
    return torch.where(up, high, low)


@pytest.mark.parametrize("target", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("origin", ["float32", "bfloat16"])
def test_numbers_are_rounded_to_the_nearest_and_too_large_ones_saturate_in_fp8(origin: str, target: str) -> None:
    numbers = some_numbers().to(DTYPES[origin])
    prompt = 16 * (len(numbers) // (16 * MODEL_LAYERS * 2 * 8) + 1)
    kv = torch.zeros(prompt * MODEL_LAYERS * 2 * 8, dtype=DTYPES[origin])
    kv[: len(numbers)] = numbers
    source, reader = (a_side(1, 1, range(MODEL_LAYERS), 16, dtype, head_size=8) for dtype in (origin, target))
    setting = Setting.of(source, reader, prompt, kv)
    setting.carry_out((range(prompt),))
    blocks = [int(block) for block in setting.here.table]  # type: ignore[union-attr]
    found = setting.here.pools[0][blocks].permute(0, 4, 1, 2, 3, 5).reshape(-1)[: len(numbers)]  # as kv has them
    assert torch.equal(found.isnan(), numbers.isnan())
    real = ~numbers.isnan()
    x, y, rounding = numbers[real].double(), found[real].double(), ROUNDING[target]
    assert torch.equal(torch.signbit(y), torch.signbit(x))
    fits = x.abs() <= rounding.largest
    assert torch.equal(y[fits], nearest_even(numbers[real][fits], DTYPES[target]))
    error = (y - x)[fits].abs()
    assert (error <= torch.maximum(rounding.relative * x[fits].abs(), torch.tensor(rounding.absolute))).all()
    beyond = y[~fits].abs()
    assert len(beyond)
    if target == "float8_e4m3fn":
        assert (beyond == 448).all()
    else:
        assert (beyond.isinf() | (beyond == rounding.largest)).all()


@pytest.mark.parametrize(("origin", "target"), [("bfloat16", "float32"), ("float8_e4m3fn", "bfloat16")])
def test_a_wider_dtype_holds_the_same_numbers(origin: str, target: str) -> None:
    source, reader = (a_side(2, 2, range(2), block, dtype) for block, dtype in ((16, origin), (64, target)))
    setting = Setting.of(source, reader, 70)
    setting.carry_out((range(70),))
    for token in range(70):
        here = setting.here.pools[1][setting.here.table[token // 64], :, :, 0, token % 64].double()
        assert torch.equal(here, setting.kv[token, :2, :, 1].double())


@pytest.mark.parametrize("block", [-1, 100])
@pytest.mark.parametrize("at", ["source", "reader"])
def test_blocks_that_no_pool_has_are_refused_before_anything_is_written(at: str, block: int) -> None:
    setting = Setting.of(a_side(), a_side(block_tokens=32), 64)
    there, here = setting.there, setting.here
    wrong = [*there.table[:-1], BlockId(block)] if at == "source" else [here.table[0], BlockId(block)]  # type: ignore[index]
    if at == "source":
        there = Held(there.pools, wrong)
    else:
        here = Held(here.pools, wrong)
    plan = plan_hand_over(setting.source, setting.reader)
    with pytest.raises(ValueError, match="not all in a pool"):
        carry_out(plan, there, here, (range(64),))
    with pytest.raises(IndexError):
        carry_out(plan, setting.there, setting.here, (range(65),))
    with pytest.raises(KeyError):
        carry_out(plan, Held(setting.there.pools, {0: BlockId(1)}), setting.here, (range(64),))
    setting.check([])


def test_nothing_is_a_hand_over_too() -> None:
    setting = Setting.of(a_side(), a_side(block_tokens=32), 64)
    setting.carry_out(())
    setting.carry_out((range(5, 5),))
    setting.check([])
