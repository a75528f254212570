import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from baton.core.frames import Release
from baton.core.request import EndReason, Request, Sampling
from baton.engine.sequence import Sequence
from baton.kv_transfer.messages import Delivery, PeerLost
from baton.observe import names
from baton.wire.codec import frame_from_bytes
from baton.worker.records import Kind
from baton.worker.ring import RingFull

from ...batch_runs import run
from ...fakes import answer, fake_engine
from ...workers import HANDOVER_S, Pair


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def prompt_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(97), k=length)


def test_answers_are_what_the_model_says_whatever_the_lengths_and_the_batch(pair: Pair) -> None:
    wanted = {}
    for i, (length, count) in enumerate([(1, 5), (15, 2), (16, 20), (17, 3), (100, 12), (33, 40), (64, 1), (160, 2)]):
        key = pair.admit(f"r{i}", prompt_of(i, length), count)
        wanted[key] = answer(prompt_of(i, length), count)
    pair.settle()
    assert {key: pair.seen[key].answer for key in wanted} == wanted
    for key, tokens in wanted.items():
        ended = pair.seen[key].ended
        assert ended["P"].reason is (EndReason.LENGTH if len(tokens) == 1 else EndReason.HANDED_OVER)
        assert len(tokens) == 1 or ended["D"].reason is EndReason.LENGTH
    pair.assert_clean()


def test_a_prompt_that_was_seen_is_neither_computed_nor_moved_again(pair: Pair) -> None:
    prompt = prompt_of(1, 50)
    first = pair.admit("a", prompt, 20)
    pair.settle()
    second = pair.admit("b", prompt, 20)
    third = pair.admit("c", prompt + pair.seen[first].answer[:-1] + [3, 4], 4)
    pair.settle()
    assert pair.seen[second].answer == pair.seen[first].answer == answer(prompt, 20)
    assert (pair.seen[first].cached, pair.seen[second].cached) == (0, 48)
    assert pair.seen[first].ticket is not None
    assert pair.seen[second].ticket is not None
    assert (pair.seen[first].ticket.wanted, pair.seen[second].ticket.wanted) == ((0, 1, 2, 3), (3,))
    assert pair.seen[third].ticket is not None
    assert pair.seen[third].ticket.wanted == (4,)  # the answer's blocks are known to the decode worker
    assert pair.seen[third].answer == answer(prompt + pair.seen[first].answer[:-1] + [3, 4], 4)
    pair.assert_clean()


def test_a_prompt_whose_blocks_the_reader_all_has_is_handed_over_without_bytes(pair: Pair) -> None:
    prompt = prompt_of(2, 32)
    pair.admit("a", prompt, 3)
    pair.settle()
    again = pair.admit("b", prompt, 3)
    pair.settle()
    assert pair.seen[again].ticket is not None
    assert pair.seen[again].ticket.wanted == ()
    assert pair.seen[again].cached == 16  # the last token is always computed
    assert pair.seen[again].answer == answer(prompt, 3)
    pair.assert_clean()


def test_a_stop_token_ends_an_answer_at_prefill_or_at_decode(pair: Pair) -> None:
    prompt = prompt_of(3, 20)
    tokens = answer(prompt, 9)
    at_once = pair.admit("a", prompt, 9, stops=frozenset({tokens[0]}))
    later = tokens.index(tokens[4])
    after = pair.admit("b", prompt, 9, stops=frozenset({tokens[4]}))
    pair.settle()
    assert pair.seen[at_once].answer == tokens[:1]
    assert pair.seen[at_once].ended["P"].reason is EndReason.STOP
    assert pair.seen[after].answer == tokens[: later + 1]
    pair.assert_clean()


def test_a_release_is_obeyed_within_one_step_in_every_state(tmp_path: Path) -> None:
    for rounds in range(12):
        pair = Pair(tmp_path / str(rounds))
        keys = [pair.admit(f"r{i}", prompt_of(i, 90), 30) for i in range(3)]
        for _ in range(rounds):
            pair.turn()
        for key in keys:
            pair.release(key)
        pair.p.loop.turn()
        pair.d.loop.turn()
        for worker in (pair.p, pair.d):
            pair.hear(worker)
            worker.crank.run()
        pair.p.loop.turn()
        pair.d.loop.turn()
        pair.settle()
        pair.assert_clean()
        pair.close()


def test_after_a_storm_of_cancels_and_lost_links_nothing_is_held(tmp_path: Path) -> None:
    pair = Pair(tmp_path, prefill_blocks=24, decode_blocks=40)
    dice = random.Random(11)
    links: dict[str, int] = {}
    released = set()
    for i in range(150):
        name = f"r{i}"
        links[name] = dice.randint(1, 3)
        prompt = prompt_of(i % 20, dice.randint(1, 120))
        key = pair.admit(name, prompt, dice.randint(2, 30), link=links[name])
        for _ in range(dice.randint(0, 3)):
            pair.turn()
        if dice.random() < 0.4:
            victim = dice.choice(list(links))
            pair.release(type(key)(f"{victim}/0"), links[victim])
            released.add(victim)
        if dice.random() < 0.03:
            gone = dice.randint(1, 3)
            pair.p.put(Kind.LINK_CLOSED, gone)
            pair.d.put(Kind.LINK_CLOSED, gone)
            released |= {name for name, link in links.items() if link == gone}
    pair.settle(5000)
    untouched = [name for name in links if name not in released]
    assert len(untouched) > 20
    for name in untouched:
        assert pair.seen[next(key for key in pair.seen if key == f"{name}/0")].ended["D"].reason is EndReason.LENGTH
    pair.assert_clean()
    pair.close()


def test_two_routers_whose_orders_differ_cannot_make_the_workers_wait_for_each_other(tmp_path: Path) -> None:
    pair = Pair(tmp_path, prefill_blocks=5, decode_blocks=6)  # room for one each
    one, other = prompt_of(1, 70), prompt_of(2, 70)
    first, second = pair.request("a", one, 10), pair.request("b", other, 10)
    pair.p.send(first, link=1)
    pair.p.send(second, link=2)
    pair.p.loop.turn()
    pair.d.send(second, link=2)
    pair.d.send(first, link=1)
    pair.settle()
    assert pair.seen[first.sequence_id].answer == answer(one, 10)
    assert pair.seen[second.sequence_id].answer == answer(other, 10)
    pair.assert_clean()
    pair.close()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_order_of_many_routers_all_answers_come(tmp_path: Path, seed: int) -> None:
    pair, dice = Pair(tmp_path, prefill_blocks=40, decode_blocks=14), random.Random(seed)
    requests = [pair.request(f"r{i}", prompt_of(i, dice.randint(1, 200)), dice.randint(2, 20)) for i in range(16)]
    for worker in (pair.p, pair.d):
        for i, request in dice.sample(list(enumerate(requests)), len(requests)):
            worker.send(request, link=i)
        pair.p.loop.turn()
    pair.settle()
    for request in requests:
        assert pair.seen[request.sequence_id].answer == answer(request.prompt, request.sampling.max_tokens)
    pair.assert_clean()
    pair.close()


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("swap_blocks", [0, 3, 64])
def test_answers_grow_block_by_block_and_what_is_preempted_goes_on_exactly(
    tmp_path: Path, swap_blocks: int, lookahead: bool
) -> None:
    pair = Pair(tmp_path, decode_blocks=14, swap_blocks=swap_blocks, lookahead=lookahead)
    wanted = {}
    for i in range(12):
        request = replace(pair.request(f"r{i}", prompt_of(i, 5 + 7 * i % 60), 60), number=i + 1)
        wanted[pair.send(request)] = answer(request.prompt, 60)
    most = 0
    for _ in range(12):
        pair.turn()
        most = max(most, pair.d.batch.running)
    assert most > 3, "whole answers were reserved"  # of which three fill the pool
    pair.settle(4000)
    assert {key: pair.seen[key].answer for key in wanted} == wanted
    pair.clock.now += 1.0
    pair.settle()
    assert pair.preempted["swap"] + pair.preempted["recompute"] > 0
    assert pair.preempted["swap"] > 0 or swap_blocks < 64
    assert pair.preempted["recompute"] > 0 or swap_blocks == 64
    pair.assert_clean()
    pair.close()


def test_a_sequence_that_was_preempted_is_released_and_expires_like_any_other(tmp_path: Path) -> None:
    for swap_blocks in (0, 64):
        pair = Pair(tmp_path / str(swap_blocks), decode_blocks=9, swap_blocks=swap_blocks)
        keys = [pair.admit(f"r{i}", prompt_of(i, 30), 70, timeout_s=60.0) for i in range(6)]
        while not sum(pair.preempted.values()):
            pair.turn()
            pair.clock.now += 0.3
        holding = {holder.sequence_id for holder in pair.d.role.survey().holders}
        (out, *_) = [key for key in keys if len(pair.seen[key].tokens) > 1 and key not in holding]
        pair.release(out)
        pair.turn()
        assert pair.seen[out].ended["D"].reason is EndReason.RELEASED
        pair.clock.now += 60.0
        pair.settle()
        assert {pair.seen[key].ended["D"].error_code for key in keys if key != out} == {"DeadlineExceeded"}
        pair.assert_clean()
        pair.close()


def test_answers_to_one_prompt_share_its_blocks_on_both_workers(pair: Pair) -> None:
    prompt = prompt_of(6, 59)  # three full blocks and eleven tokens
    keys = [pair.admit(f"a/{i}", prompt, 30) for i in range(4)]
    most = 0
    while any(len(pair.seen[key].tokens) < 10 for key in keys):
        pair.turn()
        most = max(most, pair.p.engine.ledger.held_count)
    assert most <= 4 + 3, "a prompt's blocks are there once, but for the last one, which each copies"
    assert [pair.seen[key].cached // 16 for key in keys] == [0, 3, 3, 3]
    tickets = [pair.seen[key].ticket for key in keys]
    assert [ticket.wanted for ticket in tickets if ticket] == [(0, 1, 2, 3), (), (), ()]
    tables = {holder.sequence_id: holder.block_ids for holder in pair.d.batch.holders()}
    assert len({tuple(tables[key][:3]) for key in keys}) == 1
    assert len({tables[key][3] for key in keys}) == 4
    pair.settle()
    assert [pair.seen[key].answer for key in keys] == [answer(prompt, 30)] * 4
    pair.assert_clean()


def test_a_prompt_starts_only_where_there_is_room_for_its_copy_of_a_borrowed_block(tmp_path: Path) -> None:
    """So a prefill worker's prompts have all their blocks from the start, and none is preempted for another."""
    pair = Pair(tmp_path, prefill_blocks=34)
    short, long = prompt_of(1, 20), prompt_of(2, 511)
    first = pair.request("first", short, 5)
    pair.p.send(first)  # nobody comes for it yet: it keeps its two blocks
    pair.p.loop.turn()
    crowded = pair.admit("crowded", long, 1)  # all others
    pair.turn()
    assert pair.p.engine.ledger.available == 0
    borrower = pair.admit("borrower", short, 1)
    pair.settle()
    assert pair.p.batch.preemptions.recomputed == 0
    assert pair.seen[borrower].answer == answer(short, 1)
    assert pair.seen[crowded].answer == answer(long, 1)
    pair.d.send(first)
    pair.settle()
    assert pair.seen[first.sequence_id].answer == answer(short, 5)
    pair.assert_clean()
    pair.close()


def test_a_full_ring_loses_no_frame_and_stops_no_step(pair: Pair) -> None:
    prompt = prompt_of(5, 30)
    key = pair.admit("a", prompt, 60)
    while not pair.seen[key].tokens:
        pair.turn()
    try:
        while True:
            pair.d.rank_rings.outgoing.put(b"\x0a\0\0\0\0" + bytes(1 << 16))
    except RingFull:
        pass
    try:
        while True:
            pair.d.rank_rings.outgoing.put(b"\x0a\0\0\0\0")
    except RingFull:
        pass
    for _ in range(80):
        pair.d.loop.turn()
        pair.d.crank.run()
        pair.p.loop.turn()
        pair.p.crank.run()
        pair.hear(pair.p)
    assert pair.d.engine.ledger.held_count == 0, "the answer was not computed to its end"
    assert pair.d.loop.turn() == (False, False)
    pair.d.rings.incoming.take()
    before = pair.frames
    pair.settle()
    assert pair.frames - before <= 3, "what had waited comes merged"
    assert pair.seen[key].answer == answer(prompt, 60)
    pair.assert_clean()


def test_a_deadline_ends_a_sequence_wherever_it_is(pair: Pair) -> None:
    running = pair.admit("a", prompt_of(1, 20), 400, timeout_s=5.0)
    for _ in range(10):
        pair.turn()
    waiting = pair.admit("b", prompt_of(2, 400), 100, timeout_s=5.0)
    pair.d.loop.turn()
    pair.p.loop.turn()
    pair.clock.now += 6.0
    pair.p.loop.turn()
    pair.d.loop.turn()
    pair.settle()
    assert pair.seen[running].ended["D"].error_code == "DeadlineExceeded"
    assert pair.seen[waiting].ended["D"].error_code == "DeadlineExceeded"
    assert pair.seen[waiting].ended["P"].error_code == "DeadlineExceeded"
    pair.assert_clean()


def test_what_can_never_fit_is_refused_in_words(tmp_path: Path) -> None:
    pair = Pair(tmp_path, prefill_blocks=4, decode_blocks=4)
    beyond_context = pair.admit("a", prompt_of(1, 500), 20)
    beyond_pool = pair.admit("b", prompt_of(1, 100), 20)
    pair.turn()
    for key, word in ((beyond_context, "context"), (beyond_pool, "memory")):
        for ended in pair.seen[key].ended.values():
            assert ended.error_code == "ContextExceeded"
            assert word in ended.error_message
        assert len(pair.seen[key].ended) == 2
    pair.assert_clean()
    pair.close()


def test_beyond_the_bound_of_waiting_sequences_the_next_is_told_to_go_elsewhere(tmp_path: Path) -> None:
    pair = Pair(tmp_path, max_waiting=2)
    keys = [pair.admit(f"r{i}", prompt_of(i, 20), 4) for i in range(4)]
    pair.turn()
    codes = [[ended.error_code for ended in pair.seen[key].ended.values()] for key in keys]
    assert codes[2:] == [["Overloaded", "Overloaded"]] * 2
    pair.settle()
    assert [pair.seen[key].answer for key in keys[:2]] == [answer(prompt_of(i, 20), 4) for i in range(2)]
    pair.assert_clean()
    pair.close()


def test_admitting_twice_changes_nothing(pair: Pair) -> None:
    prompt = prompt_of(8, 40)
    key = pair.admit("a", prompt, 6)
    pair.turn()
    first = pair.seen[key].ticket
    pair.admit("a", prompt, 6)
    pair.settle()
    assert pair.seen[key].ticket == first
    assert pair.seen[key].answer == answer(prompt, 6)
    pair.assert_clean()


def test_another_routers_request_of_the_same_id_is_refused_and_the_first_goes_on(pair: Pair) -> None:
    prompt = prompt_of(8, 40)
    request = pair.request("a", prompt, 6)
    pair.p.send(request, link=1)
    pair.d.send(request, link=1)
    pair.p.send(request, link=2)
    pair.d.send(request, link=2)
    refused = []
    for worker in (pair.p, pair.d):
        worker.loop.turn()
        records = [record for record in worker.heard() if record.kind is Kind.FRAME]
        refused += [ended for r in records if r.number == 2 for ended in frame_from_bytes(r.body).ended]
        for record in records:
            if record.number == 1:
                pair.take(worker, record)
    assert [ended.error_code for ended in refused] == ["RequestConflict", "RequestConflict"]
    pair.release(request.sequence_id, link=2)  # as a router does with whatever failed; it is not its to end
    pair.settle()
    assert pair.seen[request.sequence_id].answer == answer(prompt, 6)
    pair.assert_clean()


@pytest.mark.parametrize(("told", "peer"), [("P", "D"), ("D", "P")])
def test_when_the_stream_to_a_peer_closes_the_router_hears_at_once(pair: Pair, told: str, peer: str) -> None:
    key = pair.admit("a", prompt_of(1, 200), 20)
    here = pair.workers[told]
    for _ in range(100):
        pair.turn()
        states = {holder.state for holder in here.loop._role.survey().holders}
        if states & {"lent", "reserved"} and pair.p.loop._role.lent_blocks():
            break
    here.inbox.put(Delivery(PeerLost("somebody else")))
    here.loop.turn()
    assert not pair.hear(here) or told not in pair.seen[key].ended
    here.inbox.put(Delivery(PeerLost(peer)))
    here.loop.turn()
    pair.hear(here)
    ended = pair.seen[key].ended[told]
    assert (ended.reason, ended.error_code) == (EndReason.FAILED, "WorkerLost")
    pair.release(key)
    pair.settle()
    pair.assert_clean()


def test_a_prompt_that_nobody_comes_for_gives_its_blocks_back(pair: Pair) -> None:
    key = pair.admit("a", prompt_of(1, 30), 5)
    pair.d.send(Release(sequence_id=key))
    pair.p.loop.turn()
    assert pair.p.engine.ledger.held_count == 2
    pair.clock.now += HANDOVER_S
    pair.p.loop.turn()
    pair.hear(pair.p)
    assert pair.seen[key].ended["P"].error_code == "LeaseExpired"
    pair.settle()
    pair.assert_clean()


def test_draining_answers_when_the_last_sequence_and_the_last_loan_are_over(pair: Pair) -> None:
    key = pair.admit("a", prompt_of(1, 30), 5)
    pair.p.loop.turn()
    pair.p.put(Kind.DRAIN, 9)
    pair.p.loop.turn()
    assert not [record for record in pair.p.rank_rings.outgoing.take() if record[:1] == bytes([Kind.DRAIN])]
    pair.seen.clear()
    late = pair.admit("b", prompt_of(1, 30), 5)
    pair.p.loop.turn()
    pair.hear(pair.p)
    assert pair.seen[late].ended["P"].error_code == "Unavailable"
    pair.release(key)
    pair.p.loop.turn()
    assert Kind.DRAIN in [record.kind for record in pair.p.heard()]


def test_every_part_of_a_sequence_is_reported_for_its_trace(pair: Pair) -> None:
    pair.admit("a", prompt_of(1, 30), 5)
    pair.settle()
    for worker in (pair.p, pair.d):
        worker.loop.turn()
        pair.hear(worker)
    assert sorted(pair.parts) == sorted(
        [
            *(names.SPAN_QUEUE, names.SPAN_QUEUE, names.SPAN_PREFILL, names.SPAN_OFFER),
            *(names.SPAN_RESERVE, names.SPAN_TRANSFER, names.SPAN_DECODE),
        ]
    )


def test_the_last_report_says_how_things_stand_when_nothing_runs_any_more(pair: Pair) -> None:
    request = replace(pair.request("a", prompt_of(1, 40), 20), traceparent="")  # no span makes a report go out
    for worker in (pair.p, pair.d):
        worker.send(request)
    for _ in range(12):
        pair.turn()
        pair.clock.now += 1.0
    assert pair.reports["D"].held_blocks > 0
    pair.release(request.sequence_id)
    for _ in range(4):
        pair.turn()
        pair.clock.now += 1.0
    for report in (pair.reports["P"], pair.reports["D"]):
        assert (report.held_blocks, report.lent_blocks, report.load.running, report.load.waiting) == (0, 0, 0, 0)
        assert report.load.free_blocks == report.load.total_blocks


def test_a_token_beyond_the_vocabulary_ends_its_request_alone(pair: Pair) -> None:
    bad = pair.admit("a", [1, 97], 5)
    good = pair.admit("b", [1, 96], 5)
    pair.settle()
    assert [ended.error_code for ended in pair.seen[bad].ended.values()] == ["InvalidRequest", "InvalidRequest"]
    assert pair.seen[good].answer == answer([1, 96], 5)
    pair.assert_clean()


def edited_sampling(number: int, count: int) -> Sampling:
    dice = random.Random(number)
    return Sampling(
        max_tokens=count,
        temperature=dice.choice([0.0, 2.0]),
        seed=number,
        repetition_penalty=dice.choice([1.0, 1.8]),
        presence_penalty=dice.choice([0.0, 1.5]),
        frequency_penalty=dice.choice([0.0, 2.0, -0.5]),
        logit_bias=dice.choice([(), ((5, 9.5), (6, -100.0))]),
        min_tokens=dice.choice([0, 1, min(6, count)]),
        stop_token_ids=frozenset(dice.choices(range(97), k=8)),
    )


def on_one_engine(request: Request) -> list[int]:
    sequence = Sequence.of(request)
    run(fake_engine(), [sequence])
    return sequence.tokens


def test_penalties_bias_and_min_tokens_give_the_answers_of_one_engine(pair: Pair) -> None:
    wanted = {}
    for i in range(40):
        request = pair.request(f"r{i}", prompt_of(i, 1 + i * 3), 0)
        request = replace(request, sampling=edited_sampling(i, 2 + i % 30))
        wanted[request.sequence_id] = on_one_engine(request)
        pair.p.send(request)
        pair.d.send(request)
    pair.settle(2000)
    assert {key: pair.seen[key].answer for key in wanted} == wanted
    plain = [answer(prompt_of(i, 1 + i * 3), len(answered)) for i, answered in enumerate(wanted.values())]
    assert sum(answered != free for answered, free in zip(wanted.values(), plain, strict=True)) > 20
    pair.assert_clean()


def test_edits_of_tokens_beyond_the_vocabulary_are_refused(pair: Pair) -> None:
    request = pair.request("a", [1, 2], 5)
    bad = [
        replace(request.sampling, logit_bias=((97, 1.0),)),
        replace(request.sampling, min_tokens=2, stop_token_ids=frozenset({3, 97})),
    ]
    for sampling in bad:
        refused = replace(request, sampling=sampling)
        pair.p.send(refused)
        pair.settle()
        assert pair.seen.pop(request.sequence_id).ended["P"].error_code == "InvalidRequest"
    harmless = pair.admit("b", [1, 2], 5, stops=frozenset({97}))
    pair.settle()
    assert pair.seen[harmless].answer == answer([1, 2], 5)
    pair.assert_clean()
