"""What answering, tokens and roster do by themselves; the rest is seen through the roles, as in test_loop.py."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from baton.core.frames import Report, WorkerFrame
from baton.core.ids import SequenceId
from baton.core.request import EndReason, Load, Request, Sampling, TokenLogprobs
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.engine import Engine
from baton.engine.members import Goal
from baton.engine.policies import policy
from baton.engine.sequence import Sequence
from baton.engine.step_result import Chosen, StepResult
from baton.observe import names
from baton.wire.codec import frame_from_bytes
from baton.wire.worker_codec import report_from_bytes
from baton.worker.answering import Answer, Answering
from baton.worker.outbox import Outbox
from baton.worker.records import Kind, Record
from baton.worker.reporting import Reporter
from baton.worker.ring import Ring
from baton.worker.roster import Limits, Member, Roster
from baton.worker.tokens import give_tokens, tag_of

from ...fakes import VOCAB, answer, fake_engine

LIMITS = Limits(max_waiting=64, max_model_len=512, num_blocks=64, vocab_size=VOCAB)


def request_of(name: str, *, max_tokens: int = 3, number: int = 0, logprobs: int | None = None) -> Request:
    return Request(
        sequence_id=SequenceId(name),
        prompt=(5, 6, 7),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, logprobs=logprobs),
        number=number,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


class Line:
    """A ring, what speaks into it, and what was said."""

    def __init__(self, folder: Path) -> None:
        self._writer, self._reader = Ring.create(folder / "ring"), Ring.open(folder / "ring")
        self.outbox, self.reporter = Outbox(self._writer), Reporter(self._writer)
        for link in (1, 2):
            self.outbox.open(link)

    def frames(self) -> dict[int, WorkerFrame]:
        """The last of each link."""
        self.outbox.flush(Load())
        records = [Record.parse(data) for data in self._reader.take()]
        return {record.number: frame_from_bytes(record.body) for record in records if record.kind is Kind.FRAME}

    def report(self) -> Report:
        self.reporter.flush(0.0, 0, 0)
        (record,) = [Record.parse(data) for data in self._reader.take()]
        return report_from_bytes(record.body)

    def close(self) -> None:
        self._writer.close()
        self._reader.close()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    line = Line(tmp_path)
    yield line
    line.close()


# Tokens


def grown(request: Request, *tokens: int, link: int = 1) -> Sequence:
    sequence = Sequence.of(request, tag_of(link, request))
    sequence.tokens += tokens
    return sequence


def chosen(sequences: list[Sequence], logprobs: dict[int, TokenLogprobs] | None = None) -> Chosen:
    """The last token of each."""
    return Chosen(
        sequences=sequences,
        token_ids=np.array([sequence.tokens[-1] for sequence in sequences], np.int64),
        positions=np.array([len(sequence.tokens) - 1 for sequence in sequences], np.int64),
        tags=np.array([sequence.tag for sequence in sequences], np.int64),
        logprobs=logprobs or {},
    )


def test_plain_tokens_go_as_columns_and_those_with_more_to_say_one_by_one(line: Line) -> None:
    roster: Roster[Member] = Roster(LIMITS)
    given = []
    for name, link, number, tokens in (
        ("plain/0", 1, 4, (8, 9)),
        ("other/0", 1, 7, (3, 2, 1)),
        ("elsewhere/0", 2, 4, (8, 8)),
        ("first/0", 1, 5, (6,)),
        ("asked/0", 1, 6, (6, 9)),
        ("unnumbered/0", 1, 0, (6, 5)),
    ):
        request = request_of(name, number=number, logprobs=1 if name == "asked/0" else None)
        assert roster.admit(Member(link, request, 0, None), 1) is None
        given.append(grown(request, *tokens, link=link))
    logprobs = {4: TokenLogprobs(-0.5, ((9, -0.5),))}
    first = give_tokens(line.outbox, roster, chosen(given, logprobs))
    assert [sequence.sequence_id for sequence in first] == ["first/0"]
    frames = line.frames()
    step = frames[1].step
    assert step is not None
    assert (list(step.numbers), list(step.positions), list(step.token_ids)) == ([4, 7], [1, 2], [9, 1])
    spelled = {tokens.sequence_id: tokens for tokens in frames[1].tokens}
    assert {key: (one.first_position, one.token_ids) for key, one in spelled.items()} == {
        "first/0": (0, (6,)),
        "asked/0": (1, (9,)),
        "unnumbered/0": (1, (5,)),
    }
    assert spelled[SequenceId("asked/0")].logprobs[0].top[0][0] == 9
    assert frames[2].step is not None
    assert (list(frames[2].step.numbers), frames[2].tokens) == ([4], ())


def test_what_is_known_of_a_prompt_goes_with_token_0_alone(line: Line) -> None:
    roster: Roster[Member] = Roster(LIMITS)
    request = request_of("a/0")
    roster.admit(Member(1, request, 0, None), 1)
    sequence = grown(request, 8)
    sequence.cached_tokens = 2
    sequence.prompt_logprobs = (None, TokenLogprobs(-1.0), TokenLogprobs(-2.0))
    give_tokens(line.outbox, roster, chosen([sequence]))
    (told,) = line.frames()[1].tokens
    assert (told.cached_tokens, len(told.prompt_logprobs)) == (2, 3)
    sequence.tokens.append(9)
    give_tokens(line.outbox, roster, chosen([sequence]))
    (told,) = line.frames()[1].tokens
    assert (told.cached_tokens, told.prompt_logprobs) == (0, ())


# Answering


@pytest.fixture
def engine() -> Engine:
    return fake_engine()


@pytest.fixture
def answering(engine: Engine, line: Line) -> Answering[Answer]:
    batch = ContinuousBatch(engine, policy("fcfs"))
    times = iter(range(1000, 10**9, 1000))
    return Answering(engine, batch, line.outbox, line.reporter, LIMITS, lambda: next(times))


def admit(answering: Answering[Answer], request: Request, link: int = 1) -> Answer:
    one = Answer.of(link, request, answering.now_ns(), 0.0)
    answering.admit(one, Goal.ANSWER, 0.0)
    return one


def step(answering: Answering[Answer]) -> StepResult | None:
    result = answering.batch.step(0.0)
    if result is not None:
        for sequence in result.started:
            answering.started(answering.of(sequence))
        answering.take(result, 0.001)
    return result


def test_an_answer_is_given_token_by_token_and_ends_with_all_blocks_back(
    answering: Answering[Answer], engine: Engine, line: Line
) -> None:
    admit(answering, request_of("a/0"))
    tokens: list[int] = []
    reasons: list[EndReason] = []
    while step(answering) is not None:
        frame = line.frames()[1]
        tokens += [token for one in frame.tokens for token in one.token_ids]
        reasons += [ended.reason for ended in frame.ended]
    assert tokens == answer([5, 6, 7], 3)
    assert reasons == [EndReason.LENGTH]
    assert (len(answering.roster), engine.ledger.held_count) == (0, 0)


def test_queue_prefill_and_decode_follow_each_other_without_a_gap(answering: Answering[Answer], line: Line) -> None:
    admit(answering, request_of("a/0"))
    while step(answering) is not None:
        line.frames()
    parts = line.report().parts
    assert [part.name for part in parts] == [names.SPAN_QUEUE, names.SPAN_PREFILL, names.SPAN_DECODE]
    assert [part.end_ns for part in parts[:2]] == [part.start_ns for part in parts[1:]]


def test_a_second_start_after_a_preemption_is_no_news(answering: Answering[Answer], line: Line) -> None:
    one = admit(answering, request_of("a/0"))
    answering.started(one)
    began = one.started_ns
    answering.started(one)
    assert one.started_ns == began
    assert len(line.report().parts) == 1


def test_the_load_counts_who_runs_and_who_waits_and_prompts_still_to_be_computed(
    answering: Answering[Answer],
) -> None:
    for i in range(10):  # eight have a place
        admit(answering, request_of(f"r{i}/0", max_tokens=20))
    assert (answering.load().running, answering.load().waiting, answering.load().waiting_tokens) == (0, 10, 30)
    for _ in range(4):
        step(answering)
    load = answering.load()
    assert (load.running, load.waiting, load.waiting_tokens, load.draining) == (8, 2, 6, False)
    assert load.free_blocks < load.total_blocks == 64


def test_an_id_that_another_link_has_is_refused_there_and_here_it_is_no_news(
    answering: Answering[Answer], line: Line
) -> None:
    request = request_of("a/0")
    assert answering.is_new(1, request)
    admit(answering, request)
    assert not answering.is_new(1, request)
    assert not answering.is_new(2, request)
    frames = line.frames()
    assert [ended.error_code for ended in frames[2].ended] == ["RequestConflict"]
    assert 1 not in frames or not frames[1].ended


# The roster's heap of deadlines


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("admit"), st.one_of(st.none(), st.integers(0, 30))),
            st.tuples(st.just("remove"), st.integers(0, 20)),
            st.tuples(st.just("pass"), st.integers(0, 10)),
        ),
        max_size=40,
    )
)
def test_deadlines_are_those_of_members_that_are_here_each_named_once(acts: list[tuple[str, int | None]]) -> None:
    roster: Roster[Member] = Roster(LIMITS)
    here: dict[SequenceId, float | None] = {}
    now, numbers = 0.0, iter(range(100))
    for act, value in acts:
        if act == "admit":
            deadline = None if value is None else now + value
            name = SequenceId(f"r{next(numbers)}/0")
            assert roster.admit(Member(1, request_of(name), 0, deadline), 1) is None
            here[name] = deadline
        elif act == "remove" and here:
            name = list(here)[int(value or 0) % len(here)]
            member = roster.get(name)
            assert member is not None
            roster.remove(member)
            del here[name]
        elif act == "pass":
            now += value or 0
            due = {name for name, at in here.items() if at is not None and at <= now}
            found = roster.expired(now)
            assert {member.sequence_id for member in found} == due
            assert len(found) == len(due)
            assert roster.expired(now) == []
            for member in found:  # as its caller does
                roster.remove(member)
                del here[member.sequence_id]
        assert roster.next_deadline() == min((at for at in here.values() if at is not None), default=None)


def test_an_id_that_comes_back_has_its_new_deadline_alone() -> None:
    roster: Roster[Member] = Roster(LIMITS)
    first = Member(1, request_of("a/0"), 0, 5.0)
    roster.admit(first, 1)
    roster.remove(first)
    second = Member(1, request_of("a/0"), 0, 9.0)
    roster.admit(second, 1)
    assert roster.next_deadline() == 9.0
    assert roster.expired(6.0) == []
    assert roster.expired(9.0) == [second]
