"""The batch's rows: who has which, what is known of each, and what the device is told of it."""

import random
from collections.abc import Iterable

import numpy as np
import pytest

from baton.core.ids import BlockId, SequenceId
from baton.core.request import Sampling
from baton.engine.accounts import INPUT_WEIGHT, OUTPUT_WEIGHT
from baton.engine.rows import Rows
from baton.engine.sequence import Sequence

MAX_BLOCKS = 10  # of a row
BLOCK_TOKENS = 16


def blocks_of(ids: Iterable[int]) -> list[BlockId]:
    return [BlockId(block) for block in ids]


def sequence(
    name: str = "s",
    prompt: int = 20,
    answer: int = 0,
    *,
    blocks: Iterable[int] = (),
    computed: int = 0,
    tenant: str = "",
    tag: int = 0,
    stops: Iterable[int] = (),
) -> Sequence:
    """Its prompt's tokens are 0, 1, 2, ..., its answer's 100, 101, 102, ..."""
    sampling = Sampling(max_tokens=50, stop_token_ids=frozenset(stops))
    seq = Sequence(SequenceId(name), tuple(range(prompt)), sampling, tenant=tenant, tag=tag)
    seq.tokens = list(range(100, 100 + answer))
    seq.blocks, seq.computed = blocks_of(blocks), computed
    return seq


def take(rows: Rows, seq: Sequence, *, chunked: bool = False, borrows: bool = False) -> int:
    return rows.take(seq, seq.max_length, chunked=chunked, borrows=borrows)


def a_row(rows: Rows, **given: object) -> int:
    return take(rows, sequence(**given))  # type: ignore[arg-type]


def runnable(rows: Rows) -> tuple[list[int], list[int], list[bool]]:
    found, lacking, chunked = rows.runnable()
    return found.tolist(), lacking.tolist(), chunked.tolist()


def changes(rows: Rows) -> tuple[dict[int, int], dict[int, int]]:
    """(place in the block tables -> block, row -> its last token), each told at most once."""
    at, blocks, token_rows, token_ids = rows.changes()
    assert len(set(token_rows.tolist())) == len(token_rows)
    assert len(set(zip(at.tolist(), blocks.tolist(), strict=True))) == len(set(at.tolist())), "written in any order"
    assert (at.dtype, blocks.dtype, token_rows.dtype, token_ids.dtype) == (np.int64, np.int32, np.int64, np.int64)
    return (
        dict(zip(at.tolist(), blocks.tolist(), strict=True)),
        dict(zip(token_rows.tolist(), token_ids.tolist(), strict=True)),
    )


@pytest.fixture
def rows() -> Rows:
    return Rows(4, MAX_BLOCKS)


# Coming and going


def test_a_row_is_one_sequences_until_it_is_given_back(rows: Rows) -> None:
    sequences = [sequence(f"s/{i}") for i in range(4)]
    taken = [take(rows, seq) for seq in sequences]
    assert sorted(taken) == [0, 1, 2, 3]
    assert rows.free_count == 0
    assert [rows.sequence(row) for row in taken] == sequences
    assert rows.sequences_of(np.array(taken[::-1])) == sequences[::-1]
    rows.give_back(taken[2])
    assert rows.free_count == 1
    assert not rows.live[taken[2]]
    with pytest.raises(AssertionError):
        rows.sequence(taken[2])
    assert take(rows, sequence("new")) == taken[2]


def test_a_row_knows_where_its_sequence_stands(rows: Rows) -> None:
    row = a_row(rows, prompt=20, answer=3, blocks=[7, 8], computed=22, tag=5)
    columns = ("prompt", "known", "launched", "computed", "limit", "last", "num_blocks", "tag")
    assert [int(getattr(rows, name)[row]) for name in columns] == [20, 23, 22, 22, 70, 69, 2, 5]
    assert not rows.is_flying(row)
    assert rows.live[row]
    assert rows.runs[row]


def test_nothing_of_a_rows_last_sequence_is_left_to_the_next(rows: Rows) -> None:
    row = a_row(rows, prompt=60, answer=9, blocks=range(5), computed=68, tag=9, stops=[4, 5, 6])
    rows.launch(np.array([row]))
    rows.chunked[row] = True
    rows.borrowers.add(row)
    rows.runs[row] = False
    rows.give_back(row)
    rows.changes()
    assert a_row(rows, name="new", prompt=3, blocks=[30]) == row
    fresh = Rows(4, MAX_BLOCKS)
    assert a_row(fresh, name="new", prompt=3, blocks=[30]) == row
    names = [name for name, value in vars(fresh).items() if isinstance(value, np.ndarray) and name[0] != "_"]
    for name in names:
        if name not in ("stops", "tables"):
            assert getattr(rows, name)[row] == getattr(fresh, name)[row], name
    assert not rows.borrowers
    assert not rows.is_flying(row)
    assert (rows.stops[row] < 0).all()
    assert changes(rows) == changes(fresh)


# Who may run


def test_a_row_lacks_the_tokens_whose_kv_is_neither_there_nor_under_way(rows: Rows) -> None:
    first, second = a_row(rows, prompt=20, computed=16), a_row(rows, name="t", prompt=20, answer=3, computed=22)
    assert runnable(rows) == ([first, second], [4, 1], [False, False])
    rows.launched[first] = rows.launched[second] = 20
    rows.known[second] = 24
    assert runnable(rows) == ([second], [4], [False])


def test_the_kv_of_the_last_token_is_never_computed(rows: Rows) -> None:
    row = a_row(rows, prompt=20, answer=48, computed=67)
    assert runnable(rows)[1] == [1]
    rows.launched[row], rows.known[row] = 68, 69
    assert runnable(rows)[1] == [1]
    rows.launched[row], rows.known[row] = 69, 70  # all 50 tokens are there or come
    assert runnable(rows) == ([], [], [])


def test_rows_that_left_or_give_back_do_not_run(rows: Rows) -> None:
    kept, gone, stopped = (a_row(rows, name=name) for name in "abc")
    rows.give_back(gone)
    rows.runs[stopped] = False
    assert runnable(rows)[0] == [kept]


def test_where_chunks_are_among_them_rows_stand_in_the_order_of_their_coming() -> None:
    rows, dice = Rows(8, MAX_BLOCKS), random.Random(5)
    order = [a_row(rows, name=f"s/{i}", prompt=9) for i in range(8)]
    for turn in range(40):
        row = order.pop(dice.randrange(8))
        rows.give_back(row)
        order.append(a_row(rows, name=f"t/{turn}", prompt=9, computed=dice.choice([8, 0])))
        if any(rows.launched[row] == 0 for row in order):
            assert runnable(rows)[0] == order
        else:
            assert sorted(runnable(rows)[0]) == sorted(order)
        assert runnable(rows)[1] == [9 - int(rows.launched[row]) for row in runnable(rows)[0]]


def test_a_prompt_that_is_asked_about_is_chunked_to_its_last_token_and_decodes_after(rows: Rows) -> None:
    late, early = a_row(rows, name="a"), a_row(rows, name="b", prompt=9, computed=8)
    rows.give_back(late)
    asked = take(rows, sequence("c", 20, 0, computed=19), chunked=True)
    assert asked == late  # a lower row, though it came later
    assert runnable(rows) == ([early, asked], [1, 1], [False, True])
    rows.launched[asked], rows.known[asked] = 20, 21
    assert runnable(rows) == ([asked, early], [1, 1], [False, False])  # their order matters no more


# What the device is told


def test_each_change_is_told_once(rows: Rows) -> None:
    row = a_row(rows, prompt=20, blocks=[7, 8])
    assert changes(rows) == ({row * MAX_BLOCKS: 7, row * MAX_BLOCKS + 1: 8}, {row: 19})
    assert changes(rows) == ({}, {})
    rows.add_blocks(row, blocks_of([3, 4]))
    assert changes(rows) == ({row * MAX_BLOCKS + 2: 3, row * MAX_BLOCKS + 3: 4}, {})
    rows.replace_block(row, 1, BlockId(9))
    assert changes(rows) == ({row * MAX_BLOCKS + 1: 9}, {})
    assert changes(rows) == ({}, {})
    assert rows.num_blocks[row] == 4


def test_each_of_several_rows_gets_its_block_behind_its_others(rows: Rows) -> None:
    few, many = a_row(rows, name="a", blocks=[1]), a_row(rows, name="b", blocks=[2, 3, 4])
    rows.changes()
    rows.add_block_each(np.array([many, few], np.int64), blocks_of([8, 9]))
    assert changes(rows) == ({many * MAX_BLOCKS + 3: 8, few * MAX_BLOCKS + 1: 9}, {})
    assert rows.num_blocks[[few, many]].tolist() == [2, 4]
    rows.add_block_each(np.empty(0, np.int64), [])
    assert changes(rows) == ({}, {})


def test_the_tables_are_those_of_the_sequences_however_often_the_device_is_told() -> None:
    """Rows come, grow and go at random; the device carries out what it is told, in order."""
    rows, dice, blocks = Rows(4, MAX_BLOCKS), random.Random(2), iter(range(10_000))
    table, last = np.full(4 * MAX_BLOCKS, -1), np.full(4, -1)
    held: dict[int, list[int]] = {}
    for turn in range(500):
        row = dice.choice(list(held)) if held else -1
        deed = dice.randrange(5)
        if deed == 0 and rows.free_count:
            mine = [next(blocks) for _ in range(dice.randrange(1, 4))]
            held[a_row(rows, name=f"s/{turn}", prompt=1 + turn % 7, blocks=mine)] = mine
        elif deed == 1 and held:
            rows.give_back(row)
            del held[row]
        elif deed == 2 and held and len(held[row]) < MAX_BLOCKS:
            held[row].append(next(blocks))
            rows.add_blocks(row, blocks_of(held[row][-1:]))
        elif deed == 3 and held:
            growing = [one for one in held if len(held[one]) < MAX_BLOCKS]
            for one in growing:
                held[one].append(next(blocks))
            rows.add_block_each(np.array(growing, np.int64), blocks_of(held[one][-1] for one in growing))
        elif deed == 4 and held:
            held[row][-1] = next(blocks)
            rows.replace_block(row, len(held[row]) - 1, BlockId(held[row][-1]))
        if dice.random() < 0.4:
            at, new, token_rows, token_ids = rows.changes()
            for place, block in zip(at.tolist(), new.tolist(), strict=True):
                table[place] = block
            last[token_rows] = token_ids
            for one, mine in held.items():
                assert table[one * MAX_BLOCKS :][: len(mine)].tolist() == mine
                assert last[one] == len(rows.sequence(one).prompt) - 1


def test_a_row_with_an_answer_begins_at_its_last_token(rows: Rows) -> None:
    row = a_row(rows, prompt=20, answer=3)
    assert changes(rows)[1] == {row: 102}


def test_the_token_of_a_row_that_left_at_once_is_not_told(rows: Rows) -> None:
    row = a_row(rows, prompt=20)
    rows.give_back(row)
    assert changes(rows)[1] == {}
    a_row(rows, name="new", prompt=5)
    assert changes(rows)[1] == {row: 4}


def test_stops_grow_wider_and_keep_what_is_there(rows: Rows) -> None:
    one = a_row(rows, name="a", stops=[5])
    assert rows.stops.shape == (4, 1)
    many = a_row(rows, name="b", stops=[9, 3, 6])
    none = a_row(rows, name="c")
    assert rows.stops.shape == (4, 3)
    assert rows.stops[many].tolist() == [3, 6, 9]
    assert (rows.stops[one] >= 0).tolist() == [True, False, False]
    assert rows.stops[one, 0] == 5
    assert (rows.stops[none] < -1).all()  # -1 is the sampler's for no token
    rows.give_back(many)
    assert a_row(rows, name="d", stops=[2]) == many
    assert set(rows.stops[many].tolist()) - {2} == {int(rows.stops[none, 0])}


# Steps


def test_a_row_flies_until_the_last_step_that_has_it_is_taken_in(rows: Rows) -> None:
    one, other = a_row(rows, name="a"), a_row(rows, name="b")
    rows.launch(np.array([one, other]))
    rows.launch(np.array([other]))
    assert (rows.is_flying(one), rows.is_flying(other)) == (True, True)
    rows.collect()
    assert (rows.is_flying(one), rows.is_flying(other)) == (False, True)
    rows.collect()
    assert (rows.is_flying(one), rows.is_flying(other)) == (False, False)


def test_a_token_goes_into_the_block_of_its_position(rows: Rows) -> None:
    one, other = a_row(rows, name="a", blocks=[7, 3]), a_row(rows, name="b", blocks=[0, 5, 2])
    at, positions = np.array([one, one, other, other]), np.array([0, 31, 15, 32])
    assert rows.slots(at, positions, BLOCK_TOKENS).tolist() == [7 * 16, 3 * 16 + 15, 15, 2 * 16]


def test_a_row_needs_a_block_where_its_next_token_has_none_and_where_its_last_is_another_s(rows: Rows) -> None:
    given: list[tuple[int, list[int], bool]] = [(15, [1], False), (16, [1], False), (31, [1, 2], True), (16, [1], True)]
    taken = [
        take(rows, sequence(f"s/{i}", prompt=computed + 1, computed=computed, blocks=blocks), borrows=borrows)
        for i, (computed, blocks, borrows) in enumerate(given)
    ]
    assert rows.blocks_needed(np.array(taken), BLOCK_TOKENS).tolist() == [0, 1, 1, 2]
    assert rows.blocks_needed(np.array(taken[1:2]), BLOCK_TOKENS).tolist() == [1]


# Sums over the batch


PROMPTS: dict[str, dict[str, int]] = {
    "new": {"prompt": 20},
    "answers": {"prompt": 20, "answer": 4, "computed": 23},
    "partly cached": {"prompt": 30, "computed": 16},
}


def test_tokens_ahead_are_those_of_prompts_that_no_step_has(rows: Rows) -> None:
    assert rows.tokens_ahead() == 0
    first, _, gone = (a_row(rows, name=name, **given) for name, given in PROMPTS.items())
    assert rows.tokens_ahead() == 20 + 0 + 14
    rows.launched[first] = 12
    rows.give_back(gone)
    assert rows.tokens_ahead() == 8


def test_unused_slots_are_places_without_kv_in_the_blocks_of_rows_that_live(rows: Rows) -> None:
    assert rows.unused_slots(BLOCK_TOKENS) == 0
    one = a_row(rows, name="a", prompt=20, blocks=[1, 2])
    other = a_row(rows, name="b", prompt=20, answer=13, computed=32, blocks=[3, 4, 5])
    assert rows.unused_slots(BLOCK_TOKENS) == 32 + 16
    rows.computed[one] = 20
    assert rows.unused_slots(BLOCK_TOKENS) == 12 + 16
    rows.live[other] = False
    assert rows.unused_slots(BLOCK_TOKENS) == 12


# What tenants are charged


def test_each_tenant_pays_for_its_own_tokens(rows: Rows) -> None:
    answering = a_row(rows, name="a", prompt=20, answer=4, computed=23, tenant="x")
    reading = a_row(rows, name="b", prompt=30, tenant="y")
    both = a_row(rows, name="c", prompt=30, tenant="x")
    a_row(rows, name="d", tenant="idle")
    decode = np.array([answering])
    assert rows.costs(decode, [(reading, 10), (both, 5)]) == {
        "x": OUTPUT_WEIGHT + 5 * INPUT_WEIGHT,
        "y": 10 * INPUT_WEIGHT,
    }
    assert rows.costs(np.empty(0, np.int64), []) == {}


def test_tokens_that_are_computed_again_cost_nothing(rows: Rows) -> None:
    seq = sequence(prompt=30, tenant="x")
    row = take(rows, seq)
    nobody = np.empty(0, np.int32)
    assert rows.costs(nobody, [(row, 20)]) == {"x": 20 * INPUT_WEIGHT}
    rows.give_back(row)  # preempted, and its KV lost
    again = take(rows, seq)
    assert rows.costs(nobody, [(again, 12)]) == {}
    rows.launched[again] = 12
    assert rows.costs(nobody, [(again, 18)]) == {"x": 10 * INPUT_WEIGHT}
    assert seq.charged == 30


def test_cached_tokens_cost_nothing(rows: Rows) -> None:
    row = a_row(rows, prompt=30, computed=16, tenant="x")
    assert rows.costs(np.empty(0, np.int64), [(row, 14)]) == {"x": 14 * INPUT_WEIGHT}
