"""A worker that does both, driven over its ring as its service does; answers are always the fake model's own."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.ids import Epoch, SequenceId, TicketId
from baton.core.request import EndReason, Request, Sampling
from baton.kv_transfer.encoding import encode
from baton.kv_transfer.inbox import deliver
from baton.kv_transfer.messages import Returned
from baton.observe import names
from baton.wire.codec import frame_from_bytes
from baton.worker.records import Kind

from ...fakes import answer
from ...workers import Alone


@pytest.fixture(params=[False, True], ids=["at once", "look-ahead"])
def alone(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Alone]:
    alone = Alone(tmp_path, lookahead=request.param)
    yield alone
    alone.close()


def prompt_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(97), k=length)


def test_answers_are_what_the_model_says_whatever_the_lengths_and_the_batch(alone: Alone) -> None:
    wanted = {}
    for i, (length, count) in enumerate([(1, 5), (15, 2), (16, 20), (17, 3), (100, 12), (33, 40), (64, 1), (160, 2)]):
        key = alone.admit(f"r{i}", prompt_of(i, length), count)
        wanted[key] = answer(prompt_of(i, length), count)
    alone.settle()
    assert {key: alone.seen[key].answer for key in wanted} == wanted
    assert {alone.seen[key].ended["B"].reason for key in wanted} == {EndReason.LENGTH}
    alone.assert_clean()


def test_numbered_sequences_have_their_tokens_as_columns_and_every_answer_once(alone: Alone) -> None:
    wanted = {}
    for i in range(8):
        request = replace(alone.request(f"r{i}", prompt_of(i, 20 + i), 12), number=i % 4)  # 0: by its id alone
        request = replace(request, number=0 if i % 4 == 0 else i)
        wanted[alone.send(request)] = answer(request.prompt, 12)
    alone.settle()
    assert {key: alone.seen[key].answer for key in wanted} == wanted
    alone.assert_clean()


def test_a_stop_token_ends_an_answer_with_itself(alone: Alone) -> None:
    prompt = prompt_of(3, 20)
    tokens = answer(prompt, 9)
    first = alone.admit("a", prompt, 9, stops=frozenset({tokens[0]}))
    later = alone.admit("b", prompt, 9, stops=frozenset({tokens[4]}))
    alone.settle()
    assert alone.seen[first].answer == tokens[:1]
    assert alone.seen[later].answer == tokens[: tokens.index(tokens[4]) + 1]
    assert [alone.seen[key].ended["B"].reason for key in (first, later)] == [EndReason.STOP] * 2
    alone.assert_clean()


def test_chunks_of_a_prompt_share_their_steps_with_answers(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    running = alone.admit("a", prompt_of(1, 10), 60)
    alone.turn()
    alone.turn()
    prompt = prompt_of(2, 200)
    long = alone.admit("b", prompt, 3)
    turns = 0
    while not alone.seen[long].tokens:
        before = len(alone.seen[running].tokens)
        alone.turn()
        turns += 1
        assert len(alone.seen[running].tokens) == before + 1, "a prompt held the answer up"
    assert turns == 6  # 40 tokens a step, one of which is the answer's
    alone.settle()
    assert (alone.seen[running].answer, alone.seen[long].answer) == (answer(prompt_of(1, 10), 60), answer(prompt, 3))
    alone.assert_clean()
    alone.close()


def test_a_prompt_and_its_answer_are_known_to_the_next_turn_of_a_conversation(alone: Alone) -> None:
    prompt = prompt_of(1, 50)
    first = alone.admit("a", prompt, 20)
    alone.settle()
    follow = prompt + alone.seen[first].answer + [3, 4]
    second = alone.admit("b", follow, 4)
    alone.settle()
    assert (alone.seen[first].cached, alone.seen[second].cached) == (0, 64)
    assert alone.seen[second].answer == answer(follow, 4)
    alone.assert_clean()


def test_answers_to_one_prompt_compute_it_once(alone: Alone) -> None:
    prompt = prompt_of(4, 59)
    keys = [alone.admit(f"a/{i}", prompt, 6) for i in range(4)]
    alone.settle()
    assert [alone.seen[key].answer for key in keys] == [answer(prompt, 6)] * 4
    assert sorted(alone.seen[key].cached for key in keys) == [0, 58, 58, 58]
    alone.assert_clean()


def test_log_probabilities_of_a_prompt_come_with_its_first_token(alone: Alone) -> None:
    prompt = prompt_of(5, 100)
    sampling = Sampling(max_tokens=4, temperature=0.0, prompt_logprobs=1, logprobs=0)
    alone.admit("warm", prompt, 2)
    alone.settle()
    key = alone.send(replace(alone.request("a", prompt, 4), sampling=sampling))
    alone.settle()
    seen = alone.seen[key]
    assert seen.answer == answer(prompt, 4)
    assert len(seen.prompt_logprobs) == len(prompt)
    assert seen.prompt_logprobs[0] is None
    assert all(entry is not None and entry.logprob <= 0 and len(entry.top) == 1 for entry in seen.prompt_logprobs[1:])
    assert (len(seen.logprobs), seen.cached) == (4, 0)  # of a cached prompt nothing would be learnt
    alone.assert_clean()


def test_a_release_is_obeyed_within_one_step_in_every_state(tmp_path: Path) -> None:
    for rounds in range(10):
        alone = Alone(tmp_path / str(rounds), lookahead=bool(rounds % 2))
        keys = [alone.admit(f"r{i}", prompt_of(i, 90), 30) for i in range(3)]
        for _ in range(rounds):
            alone.turn()
        for key in keys:
            alone.release(key)
            alone.release(key)
        alone.turn()
        assert [alone.seen[key].ended["B"].reason for key in keys] == [EndReason.RELEASED] * 3
        alone.settle()
        alone.assert_clean()
        alone.close()


def test_a_link_that_closes_takes_its_own_sequences_with_it(alone: Alone) -> None:
    mine = alone.admit("a", prompt_of(1, 30), 40, link=1)
    other = alone.admit("b", prompt_of(2, 30), 40, link=2)
    for _ in range(4):
        alone.turn()
    alone.close_link(1)
    alone.settle()
    assert len(alone.seen[mine].tokens) < 10
    assert alone.seen[other].answer == answer(prompt_of(2, 30), 40)
    alone.assert_clean()


def test_a_deadline_ends_a_sequence_wherever_it_is(tmp_path: Path) -> None:
    alone = Alone(tmp_path, max_batch=1)
    running = alone.admit("a", prompt_of(1, 20), 400, timeout_s=5.0)
    alone.turn()
    waiting = alone.admit("b", prompt_of(2, 20), 100, timeout_s=5.0)
    for _ in range(6):
        alone.turn()
    alone.clock.now += 6.0
    alone.settle()
    for key in (running, waiting):
        assert alone.seen[key].ended["B"].error_code == "DeadlineExceeded"
    assert (len(alone.seen[running].tokens) > 1, alone.seen[waiting].tokens) == (True, {})
    alone.assert_clean()
    alone.close()


def test_admitting_twice_changes_nothing_and_another_routers_id_is_refused(alone: Alone) -> None:
    request = alone.request("a", prompt_of(8, 40), 6)
    for link in (1, 1, 2):
        alone.b.send(request, link=link)
    alone.b.loop.turn()
    records = alone.b.heard()
    refused = [
        ended
        for record in records
        if record.kind is Kind.FRAME and record.number == 2
        for ended in frame_from_bytes(record.body).ended
    ]
    assert [ended.error_code for ended in refused] == ["RequestConflict"]
    for record in records:
        if record.number != 2:
            alone.take(alone.b, record)
    alone.release(request.sequence_id, link=2)  # not its to end
    alone.settle()
    assert alone.seen[request.sequence_id].answer == answer(request.prompt, 6)
    alone.assert_clean()


def test_what_can_never_fit_is_refused_in_words(tmp_path: Path) -> None:
    alone = Alone(tmp_path, blocks=4)
    refusals = {
        alone.admit("a", prompt_of(1, 500), 20): ("ContextExceeded", "context"),
        alone.admit("b", prompt_of(1, 50), 20): ("ContextExceeded", "memory"),
        alone.admit("c", [1, 97], 5): ("InvalidRequest", "token"),
    }
    fits = alone.admit("d", prompt_of(1, 50), 15)  # the last token's KV needs no place
    alone.settle()
    for key, (code, word) in refusals.items():
        assert alone.seen[key].ended["B"].error_code == code
        assert word in alone.seen[key].ended["B"].error_message
    assert alone.seen[fits].answer == answer(prompt_of(1, 50), 15)
    alone.assert_clean()
    alone.close()


def test_beyond_the_bound_of_waiting_sequences_the_next_is_told_to_go_elsewhere(tmp_path: Path) -> None:
    alone = Alone(tmp_path, max_waiting=2)
    keys = [alone.admit(f"r{i}", prompt_of(i, 20), 4) for i in range(4)]
    alone.settle()
    assert [alone.seen[key].ended["B"].error_code for key in keys] == ["", "", "Overloaded", "Overloaded"]
    assert [alone.seen[key].answer for key in keys[:2]] == [answer(prompt_of(i, 20), 4) for i in range(2)]
    alone.assert_clean()
    alone.close()


def test_draining_takes_nothing_new_and_answers_when_the_last_answer_is_over(alone: Alone) -> None:
    key = alone.admit("a", prompt_of(1, 30), 20)
    alone.turn()
    alone.b.put(Kind.DRAIN, 9)
    late = alone.admit("b", prompt_of(1, 30), 5)
    heard = []
    for _ in range(40):
        alone.b.loop.turn()
        records = alone.b.heard()
        heard += [(record.kind, len(alone.seen[key].tokens)) for record in records]
        for record in records:
            alone.take(alone.b, record)
    assert alone.seen[late].ended["B"].error_code == "Unavailable"
    assert alone.seen[key].answer == answer(prompt_of(1, 30), 20)
    ((_, given),) = [entry for entry in heard if entry[0] is Kind.DRAIN]
    assert given >= 19
    alone.b.put(Kind.REMAINING, 3)
    alone.b.loop.turn()
    assert [record.body for record in alone.b.heard() if record.kind is Kind.REMAINING] == [bytes(4)]


def test_mail_of_a_peer_changes_nothing(alone: Alone) -> None:
    key = alone.admit("a", prompt_of(1, 30), 5)
    alone.turn()
    message = Returned(ticket_id=TicketId("t"), sequence_id=key, source_epoch=Epoch(1))
    deliver(alone.b.inbox, encode(message), ())
    alone.settle()
    assert alone.seen[key].answer == answer(prompt_of(1, 30), 5)
    alone.assert_clean()


def test_every_part_of_a_sequence_is_reported_for_its_trace(alone: Alone) -> None:
    alone.admit("a", prompt_of(1, 30), 5)
    alone.settle()
    assert sorted(alone.parts) == sorted([names.SPAN_QUEUE, names.SPAN_PREFILL, names.SPAN_DECODE])


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("swap_blocks", [0, 2, 64])
def test_a_lack_of_blocks_preempts_and_no_answer_changes(tmp_path: Path, swap_blocks: int, lookahead: bool) -> None:
    alone = Alone(tmp_path, blocks=14, swap_blocks=swap_blocks, lookahead=lookahead)
    wanted = {}
    for i in range(12):
        request = replace(alone.request(f"r{i}", prompt_of(i, 5 + 7 * i % 60), 45), number=i + 1)
        wanted[alone.send(request)] = answer(request.prompt, 45)
    alone.settle(3000)
    assert {key: alone.seen[key].answer for key in wanted} == wanted
    alone.clock.now += 1.0
    alone.settle()
    assert alone.preempted["swap"] + alone.preempted["recompute"] > 0
    assert (alone.preempted["swap"] > 0) == (swap_blocks == 64)
    alone.assert_clean()
    alone.close()


def test_the_higher_priority_goes_first_where_the_policy_looks_at_it(tmp_path: Path) -> None:
    for policy_name in ("priority", "fcfs"):
        alone = Alone(tmp_path / policy_name, max_batch=1, policy_name=policy_name)
        first = alone.admit("first", prompt_of(9, 20), 8)
        alone.turn()
        keys = []
        for i, (name, priority) in enumerate([("low", -1), ("normal", 0), ("high", 3)]):
            alone.clock.now += 0.01
            keys.append(alone.send(replace(alone.request(name, prompt_of(i, 20), 4), priority=priority)))
            alone.turn()
        alone.settle()
        order = sorted([first, *keys], key=lambda key: alone.seen[key].ended_in["B"])
        low, normal, high = keys
        assert order == [first, *([high, normal, low] if policy_name == "priority" else [low, normal, high])]
        alone.assert_clean()
        alone.close()


class Storm(RuleBasedStateMachine):
    """Routers admit, release, go away and come back at any time: what is given is right, and no block is lost."""

    @initialize(
        blocks=st.integers(10, 24),
        swap_blocks=st.sampled_from([0, 3, 64]),
        max_batch=st.integers(1, 6),
        lookahead=st.booleans(),
        policy_name=st.sampled_from(["fcfs", "priority", "hybrid"]),
    )
    def begin(self, **options: object) -> None:
        self.folder = TemporaryDirectory()
        self.alone = Alone(Path(self.folder.name), **options)  # type: ignore[arg-type]
        self.requests: dict[SequenceId, tuple[int, Request]] = {}
        self.given_up: set[SequenceId] = set()

    @rule(
        link=st.integers(1, 3),
        stem=st.integers(0, 2),
        shared=st.integers(0, 70),
        own=st.integers(1, 20),
        max_tokens=st.integers(1, 50),
        priority=st.integers(-2, 2),
        timeout_s=st.sampled_from([None, None, 5.0]),
    )
    def admit(
        self, link: int, stem: int, shared: int, own: int, max_tokens: int, priority: int, timeout_s: float | None
    ) -> None:
        number = len(self.requests)
        prompt = [*prompt_of(stem, shared), *([stem] * own)]
        request = self.alone.request(f"r{number}", prompt, max_tokens, timeout_s=timeout_s)
        request = replace(request, priority=priority, number=number + 1 if number % 2 else 0, tenant=f"t{stem}")
        self.requests[self.alone.send(request, link)] = (link, request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.requests)))
        self.given_up.add(key)
        self.alone.release(key, self.requests[key][0])

    @rule(link=st.integers(1, 3))
    def lose(self, link: int) -> None:
        self.given_up |= {key for key, (of, _) in self.requests.items() if of == link}
        self.alone.close_link(link)

    @rule(turns=st.integers(1, 8), seconds=st.sampled_from([0.0, 0.0, 2.0]))
    def turn(self, turns: int, seconds: float) -> None:
        self.alone.clock.now += seconds
        for _ in range(turns):
            self.alone.turn()

    @invariant()
    def what_was_given_is_right(self) -> None:
        for key, (_, request) in self.requests.items():
            given = self.alone.seen[key].answer
            assert given == answer(request.prompt, len(given))

    def teardown(self) -> None:
        if not hasattr(self, "alone"):
            return
        self.alone.settle(5000)
        for key, (_, request) in self.requests.items():
            ended = self.alone.seen[key].ended.get("B")
            if key in self.given_up:
                continue
            assert ended is not None, "a sequence was starved"
            assert ended.error_code in ("", "DeadlineExceeded")
            assert ended.error_code or len(self.alone.seen[key].tokens) == request.sampling.max_tokens
        self.alone.assert_clean()
        self.alone.close()
        self.folder.cleanup()


TestStorm = Storm.TestCase
TestStorm.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
