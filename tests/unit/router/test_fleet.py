"""Links as the fleet sees them: claims, queues and what a lost one leaves."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from baton.core.errors import Overloaded, Unavailable
from baton.core.frames import Command, HandOver, Release, StepTokens, TicketGranted, WorkerFrame
from baton.core.ids import Epoch, SequenceId, WorkerId
from baton.core.request import Ended, EndReason, Load, Request, Sampling, SequenceTokens
from baton.router.fleet import Fleet
from baton.router.placement import Need, Role
from baton.router.seats import MAX_NUMBER, Member, TakenSeat
from baton.router.workers import News, Seats
from baton.wire.registry import WorkerRecord

from .fakes import a_ticket, turns, until

NEED = Need(prompt_tokens=16, max_tokens=16)  # two blocks


class FakeLine:
    def __init__(
        self, record: WorkerRecord, on_frame: Callable[[WorkerFrame], None], on_state: Callable[[bool], None]
    ) -> None:
        self.record = record
        self.on_frame = on_frame
        self.on_state = on_state
        self.connected = False
        self.closed = False
        self.sent: list[Command] = []
        self.busy = False

    async def start(self) -> None:
        self.connected = True
        self.on_state(True)

    def send(self, command: Command) -> None:
        if self.busy:
            raise Overloaded("busy")
        self.sent.append(command)

    async def close(self) -> None:
        self.closed = True

    def load(self, **fields: Any) -> None:
        self.on_frame(WorkerFrame(load=Load(**{"free_blocks": 8, "total_blocks": 8, **fields})))


class Yard:
    """A fleet with a prefill and a decode worker of eight blocks each."""

    def __init__(self, wait_s: float = 5.0, max_waiting: int = 8) -> None:
        self.lines: dict[str, FakeLine] = {}
        self.fleet = Fleet(model="m", open_line=self.open, max_waiting=max_waiting, wait_s=wait_s)

    def open(self, record: WorkerRecord, *callbacks: Any) -> FakeLine:
        self.lines[f"{record.worker_id}.{record.epoch}"] = FakeLine(record, *callbacks)
        return self.lines[f"{record.worker_id}.{record.epoch}"]

    async def list(self, *records: WorkerRecord) -> None:
        self.fleet.update({record.worker_id: record for record in records})
        await turns(3)


def a_record(name: str, role: str, epoch: int = 1, **fields: Any) -> WorkerRecord:
    values = {
        "address": f"{name}:1",
        "model": "m",
        "fingerprint": "f",
        "model_fingerprint": "g",
        "max_model_len": 100,
        "vocab_size": 300,
        "dtype": "float32",
        "block_tokens": 16,
        "num_blocks": 8,
        **fields,
    }
    return WorkerRecord(worker_id=WorkerId(name), epoch=Epoch(epoch), role=role, **values)


P, D, B = a_record("p", "prefill"), a_record("d", "decode"), a_record("b", "both")


async def a_yard(**options: Any) -> Yard:
    yard = Yard(**options)
    await yard.list(P, D)
    return yard


def a_request(name: str = "r/0") -> Request:
    return Request(sequence_id=SequenceId(name), prompt=(1,) * 16, sampling=Sampling(max_tokens=16))


def admit(seats: Seats, name: str = "r/0") -> tuple[list[News], list[News]]:
    assert seats.decode
    heard: tuple[list[News], list[News]] = ([], [])
    seats.prefill.admit(a_request(name), heard[0].append)
    seats.decode.admit(a_request(name), heard[1].append)
    return heard


def free(yard: Yard, role: Role = Role.DECODE) -> int:
    return next(view.free_blocks for view in yard.fleet.views() if view.role is role)


async def test_it_is_ready_when_both_kinds_are_linked() -> None:
    yard = Yard()
    assert not yard.fleet.ready
    await yard.list(P)
    assert not yard.fleet.ready
    await yard.list(P, D)
    assert yard.fleet.ready
    assert yard.fleet.linked(Role.PREFILL) == 1
    yard.lines["d.1"].load(draining=True)
    assert not yard.fleet.ready
    yard.lines["d.1"].load()
    assert yard.fleet.ready
    yard.lines["p.1"].on_state(False)
    assert not yard.fleet.ready


async def test_workers_of_another_model_are_left_alone() -> None:
    yard = Yard()
    await yard.list(a_record("x", "prefill", model="other"))
    assert not yard.lines


async def test_the_model_is_what_all_workers_can_serve() -> None:
    yard = Yard()
    with pytest.raises(Unavailable):
        yard.fleet.limits()
    await yard.list(P, a_record("d", "decode", max_model_len=1000, num_blocks=5))
    assert yard.fleet.limits().max_model_len == 80, "a pool of 5 blocks of 16 holds no more"
    await yard.list()
    assert yard.fleet.limits().max_model_len == 80, "the last known"


async def test_a_claim_counts_until_the_worker_s_load_has_it() -> None:
    yard = await a_yard()
    seats = await yard.fleet.seats(NEED)
    admit(seats)
    assert free(yard) == 6
    yard.lines["d.1"].load(free_blocks=8)
    assert free(yard) == 6, "a load from before the worker knew"
    granted = TicketGranted(sequence_id=SequenceId("r/0"), ticket=a_ticket("t"))
    yard.lines["d.1"].on_frame(WorkerFrame(tickets=(granted,), load=Load(free_blocks=6, total_blocks=8)))
    assert free(yard) == 6, "not counted twice"
    seats.release()
    yard.lines["d.1"].load(free_blocks=8)
    assert free(yard) == 8


async def test_prompts_just_sent_count_as_tokens_ahead() -> None:
    yard = await a_yard()
    admit(await yard.fleet.seats(NEED))
    assert [view.waiting_tokens for view in yard.fleet.views() if view.role is Role.PREFILL] == [16]


async def test_a_frame_reaches_its_listener_whole_and_at_once() -> None:
    yard = await a_yard()
    prefill, decode = admit(await yard.fleet.seats(NEED))
    name = SequenceId("r/0")
    tokens = SequenceTokens(sequence_id=name, first_position=1, token_ids=(5,))
    end = Ended(sequence_id=name, reason=EndReason.STOP)
    other = SequenceTokens(sequence_id=SequenceId("x/0"), first_position=0, token_ids=(9,))
    yard.lines["d.1"].on_frame(WorkerFrame(tokens=(tokens, other), ended=(end,)))
    assert decode == [News(tokens=(tokens,), ended=end)]
    assert not prefill


async def test_columns_reach_each_sequence_by_its_number() -> None:
    yard = await a_yard()
    heard = [admit(await yard.fleet.seats(NEED), name)[1] for name in ("r/0", "s/0")]
    line = yard.lines["d.1"]
    one, other = [command.number for command in line.sent if isinstance(command, Request)]
    assert one != other
    assert 0 not in (one, other)
    step = StepTokens(numbers=(one, other, 99, one), positions=(1, 1, 5, 2), token_ids=(5, 6, 7, 8))
    end = Ended(sequence_id=SequenceId("r/0"), reason=EndReason.STOP)
    line.on_frame(WorkerFrame(step=step, ended=(end,)))
    assert heard == [[News(plain=[(1, 5), (2, 8)], ended=end)], [News(plain=[(1, 6)])]]
    line.on_frame(WorkerFrame(step=StepTokens(numbers=(one, other), positions=(3, 2), token_ids=(1, 2))))
    assert heard[0][1:] == [], "it has ended"
    assert heard[1][1:] == [News(plain=[(2, 2)])]


async def test_tokens_of_a_released_sequence_never_reach_the_one_that_comes_after_it() -> None:
    yard = await a_yard()
    seats = await yard.fleet.seats(NEED)
    admit(seats)
    seats.release()
    _, heard = admit(await yard.fleet.seats(NEED))
    line = yard.lines["d.1"]
    before, after = [command.number for command in line.sent if isinstance(command, Request)]
    line.on_frame(WorkerFrame(step=StepTokens(numbers=(before, after), positions=(7, 1), token_ids=(1, 2))))
    assert heard == [News(plain=[(1, 2)])]


def test_numbers_are_never_0_nor_taken_twice_when_they_begin_again() -> None:
    member = Member(P, lambda: None, last_number=MAX_NUMBER - 1)
    member.by_number[1] = TakenSeat(member, NEED)
    assert [member.next_number() for _ in range(3)] == [MAX_NUMBER, 2, 3]


async def test_a_token_in_a_column_shows_that_the_worker_has_counted_the_sequence() -> None:
    yard = Yard()
    await yard.list(B)
    seats = await yard.fleet.seats(NEED)
    seats.prefill.admit(a_request(), lambda news: None)
    line = yard.lines["b.1"]
    line.load(free_blocks=7)
    assert free(yard, Role.BOTH) == 5, "a load from before the worker knew"
    line.on_frame(
        WorkerFrame(
            step=StepTokens(numbers=(1,), positions=(0,), token_ids=(5,)), load=Load(free_blocks=7, total_blocks=8)
        )
    )
    assert free(yard, Role.BOTH) == 7


async def test_a_worker_that_is_both_makes_the_model_ready_and_takes_a_sequence_alone() -> None:
    yard = Yard()
    await yard.list(B)
    assert yard.fleet.ready
    assert yard.fleet.linked(Role.BOTH) == 1
    seats = await yard.fleet.seats(NEED)
    assert seats.decode is None
    assert free(yard, Role.BOTH) == 6, "prompt and the answer's beginning are claimed"
    assert [view.waiting_tokens for view in yard.fleet.views()] == [16]
    seats.release()
    yard.lines["b.1"].load(draining=True)
    assert not yard.fleet.ready


async def test_of_a_long_answer_only_the_beginning_is_claimed() -> None:
    yard = Yard()
    await yard.list(a_record("p", "prefill", num_blocks=100), a_record("d", "decode", num_blocks=100))
    await yard.fleet.seats(Need(prompt_tokens=16, max_tokens=1000))
    assert free(yard) == 95
    assert free(yard, Role.PREFILL) == 99


async def test_a_release_is_sent_once_and_only_to_who_still_has_the_sequence() -> None:
    yard = await a_yard()
    seats = await yard.fleet.seats(NEED)
    admit(seats)
    end = Ended(sequence_id=SequenceId("r/0"), reason=EndReason.STOP)
    yard.lines["d.1"].on_frame(WorkerFrame(ended=(end,)))
    seats.release()
    seats.release()
    assert yard.lines["p.1"].sent[1:] == [Release(sequence_id=SequenceId("r/0"))]
    assert not yard.lines["d.1"].sent[1:]


async def test_a_seat_that_was_never_used_sends_nothing() -> None:
    yard = await a_yard()
    (await yard.fleet.seats(NEED)).release()
    assert not yard.lines["p.1"].sent
    assert free(yard) == 8


async def test_nothing_is_heard_after_a_release() -> None:
    yard = await a_yard()
    seats = await yard.fleet.seats(NEED)
    _, decode = admit(seats)
    seats.release()
    tokens = SequenceTokens(sequence_id=SequenceId("r/0"), first_position=1, token_ids=(5,))
    yard.lines["d.1"].on_frame(WorkerFrame(tokens=(tokens,)))
    yard.lines["d.1"].on_state(False)
    assert not decode


async def test_a_release_that_a_busy_line_refuses_is_sent_later() -> None:
    yard = await a_yard()
    seats = await yard.fleet.seats(NEED)
    admit(seats)
    line = yard.lines["d.1"]
    line.busy = True
    seats.release()
    line.busy = False
    await until(lambda: Release(sequence_id=SequenceId("r/0")) in line.sent)


async def test_a_hand_over_names_the_sequence() -> None:
    yard = await a_yard()
    seats = await yard.fleet.seats(NEED)
    admit(seats)
    seats.prefill.hand_over(a_ticket("t"))
    assert yard.lines["p.1"].sent[-1] == HandOver(sequence_id=SequenceId("r/0"), ticket=a_ticket("t"))


async def test_a_lost_link_tells_its_sequences_and_needs_no_release() -> None:
    yard = await a_yard()
    seats = await yard.fleet.seats(NEED)
    prefill, decode = admit(seats)
    line = yard.lines["d.1"]
    line.on_state(False)
    assert decode == [News(lost=True)]
    assert not prefill
    seats.release()
    assert len(line.sent) == 1
    with pytest.raises(Unavailable):
        seats.decode.admit(a_request(), decode.append) if seats.decode else None


async def test_a_worker_that_the_registry_forgot_stays_while_its_link_is_open() -> None:
    yard = await a_yard()
    await yard.list(P)
    assert yard.fleet.ready
    yard.lines["d.1"].on_state(False)
    await turns(3)
    assert yard.lines["d.1"].closed


async def test_a_new_life_of_a_worker_gets_a_new_link() -> None:
    yard = await a_yard()
    seats = await yard.fleet.seats(NEED)
    _, decode = admit(seats)
    await yard.list(P, a_record("d", "decode", epoch=2))
    assert decode == [News(lost=True)]
    assert yard.lines["d.1"].closed
    assert yard.lines["d.2"].connected
    assert free(yard) == 8
    seats.release()
    assert free(yard) == 8


async def test_who_finds_no_room_waits_in_order_and_a_small_one_does_not_pass() -> None:
    yard = await a_yard()
    first = await yard.fleet.seats(Need(prompt_tokens=64, max_tokens=32))  # six of eight blocks
    large = asyncio.create_task(yard.fleet.seats(Need(prompt_tokens=64, max_tokens=64)))
    small = asyncio.create_task(yard.fleet.seats(NEED))
    await turns(3)
    assert not large.done()
    assert not small.done(), "it would fit, but the large one was first"
    first.release()
    await turns(3)
    assert large.done()
    assert not small.done()
    (await large).release()
    (await small).release()
    assert free(yard) == 8


async def test_who_gives_up_waiting_lets_the_next_one_go() -> None:
    yard = await a_yard()
    first = await yard.fleet.seats(Need(prompt_tokens=64, max_tokens=32))
    large = asyncio.create_task(yard.fleet.seats(Need(prompt_tokens=64, max_tokens=64)))
    small = asyncio.create_task(yard.fleet.seats(NEED))
    await turns(3)
    large.cancel()
    await turns(3)
    (await small).release()
    first.release()
    assert free(yard) == 8


async def test_a_seat_given_at_the_moment_of_a_cancel_is_given_back() -> None:
    yard = await a_yard()
    first = await yard.fleet.seats(Need(prompt_tokens=64, max_tokens=64))
    waiting = asyncio.create_task(yard.fleet.seats(NEED))
    await turns(3)
    first.release()  # gives the seat, which the task has not taken yet
    waiting.cancel()
    await turns(3)
    assert waiting.cancelled()
    assert free(yard) == 8


async def test_a_wait_has_an_end_and_says_why() -> None:
    yard = await a_yard(wait_s=0.01)
    await yard.fleet.seats(Need(prompt_tokens=64, max_tokens=64))
    with pytest.raises(Overloaded, match="0 free"):
        await yard.fleet.seats(NEED)
    empty = Yard(wait_s=0.01)
    with pytest.raises(Unavailable, match="prefill"):
        await empty.fleet.seats(NEED)


async def test_no_more_wait_than_may() -> None:
    yard = Yard(max_waiting=1)
    waiting = asyncio.create_task(yard.fleet.seats(NEED))
    await turns(3)
    with pytest.raises(Overloaded, match="most"):
        await yard.fleet.seats(NEED)
    waiting.cancel()
    await turns(3)


async def test_who_can_never_be_placed_holds_up_no_one() -> None:
    yard = await a_yard()
    first = await yard.fleet.seats(Need(prompt_tokens=64, max_tokens=64))
    impossible = asyncio.create_task(yard.fleet.seats(Need(prompt_tokens=64, max_tokens=1000)))
    small = asyncio.create_task(yard.fleet.seats(NEED))
    await turns(3)
    first.release()
    (await small).release()
    impossible.cancel()
    await turns(3)


async def test_a_worker_that_comes_takes_those_who_wait() -> None:
    yard = Yard()
    waiting = asyncio.create_task(yard.fleet.seats(NEED))
    await turns(3)
    await yard.list(P, D)
    assert (await waiting).placement.decode == "d"


async def test_closing_closes_every_line() -> None:
    yard = await a_yard()
    await yard.fleet.close()
    assert all(line.closed for line in yard.lines.values())
    assert not yard.fleet.ready


async def test_a_worker_that_says_goodbye_has_left_and_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "baton.router.fleet")
    yard = await a_yard()
    yard.lines["d.1"].load(draining=True)
    yard.lines["d.1"].on_state(False)
    yard.lines["p.1"].on_state(False)
    yard.lines["p.1"].on_state(True)
    await yard.list(D)
    yard.lines["p.1"].on_state(False)
    yard.lines["d.1"].on_state(True)
    await yard.fleet.close()
    said = [record.getMessage() for record in caplog.records if "linked" not in record.getMessage()]
    assert said == ["decode worker d left", "prefill worker p lost", "prefill worker p left", "decode worker d left"]
