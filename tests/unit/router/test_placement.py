from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.ids import WorkerId
from baton.router.placement import PREDICTED_TOKENS, Need, NoPlace, Placement, Role, WorkerView, place

NEED = Need(prompt_tokens=100, max_tokens=28)


def view(name: str, role: Role, **fields: Any) -> WorkerView:
    defaults = {"model_fingerprint": "f", "block_tokens": 16, "total_blocks": 100, "free_blocks": 100}
    return WorkerView(worker_id=WorkerId(name), role=role, **{**defaults, **fields})


def prefill(name: str = "p", **fields: Any) -> WorkerView:
    return view(name, Role.PREFILL, **fields)


def decode(name: str = "d", **fields: Any) -> WorkerView:
    return view(name, Role.DECODE, **fields)


def both(name: str = "b", **fields: Any) -> WorkerView:
    return view(name, Role.BOTH, **fields)


def placed(*workers: WorkerView, need: Need = NEED) -> Placement:
    found = place(need, workers)
    assert isinstance(found, Placement), found
    return found


def refused(*workers: WorkerView, need: Need = NEED) -> NoPlace:
    found = place(need, workers)
    assert isinstance(found, NoPlace), found
    return found


def test_the_prefill_worker_with_the_fewest_tokens_ahead_is_taken() -> None:
    assert placed(prefill("a", waiting_tokens=50), prefill("b", waiting_tokens=10), decode()).prefill == "b"


def test_the_decode_worker_with_the_fewest_sequences_is_taken() -> None:
    assert placed(prefill(), decode("a", sequences=3), decode("b", sequences=2, free_blocks=50)).decode == "b"


def test_of_equally_busy_decode_workers_the_emptier_one_is_taken() -> None:
    assert placed(prefill(), decode("a", free_blocks=50), decode("b", free_blocks=60)).decode == "b"


def test_a_decode_worker_must_hold_prompt_and_a_short_answer() -> None:
    assert placed(prefill(), decode("a", free_blocks=7), decode("b", free_blocks=8, sequences=9)).decode == "b"
    assert refused(prefill(), decode(free_blocks=7)).full


def test_of_a_long_answer_only_the_beginning_must_find_blocks_free() -> None:
    need = Need(prompt_tokens=100, max_tokens=1000)  # 69 blocks in all, 11 with its first 64 tokens
    assert placed(prefill(), decode(free_blocks=11), need=need).decode == "d"
    found = refused(prefill(), decode(free_blocks=10), need=need)
    assert found.full
    assert "11 blocks" in found.reason
    assert placed(both(free_blocks=11), need=need).prefill == "b"
    assert refused(both(free_blocks=10), need=need).full


def test_a_worker_that_is_both_takes_a_sequence_alone() -> None:
    found = placed(both())
    assert (found.prefill, found.decode) == ("b", None)
    assert "both" in found.reason


def test_of_workers_that_are_both_the_least_loaded_with_room_is_taken() -> None:
    busy, ahead = both("a", sequences=6), both("c", waiting_tokens=5)
    assert placed(busy, ahead, both("d", free_blocks=7)).prefill == "c"


@pytest.mark.parametrize(
    ("tokens_ahead", "beside", "alone_ahead", "alone_beside", "chosen"),
    [(0, 0, 0, 0, "p"), (5, 2, 0, 7, "p"), (5, 2, 0, 6, "b"), (500, 0, 20, 64, "b"), (0, 64, 512, 0, "p")],
)
def test_between_a_pair_and_a_single_worker_tokens_ahead_and_sequences_decide(
    tokens_ahead: int, beside: int, alone_ahead: int, alone_beside: int, chosen: str
) -> None:
    found = placed(
        prefill(waiting_tokens=tokens_ahead),
        decode(sequences=beside),
        both(waiting_tokens=alone_ahead, sequences=alone_beside),
    )
    assert found.prefill == chosen
    assert (found.decode is None) == (chosen == "b")


def test_a_pair_that_has_no_room_leaves_the_single_worker_and_the_other_way_round() -> None:
    assert placed(prefill(), decode(free_blocks=7), both(sequences=99)).prefill == "b"
    assert placed(prefill(waiting_tokens=9999), decode(), both(free_blocks=7)).decode == "d"
    assert refused(prefill(), decode(free_blocks=7), both(total_blocks=7, free_blocks=7)).full


def test_half_a_pair_does_not_keep_a_single_worker_from_work() -> None:
    assert placed(prefill(), both()).prefill == "b"
    assert placed(decode(), both()).prefill == "b"


def test_a_single_worker_that_failed_before_is_passed_over_for_a_pair() -> None:
    need = Need(prompt_tokens=5, max_tokens=5, avoid=frozenset({WorkerId("b")}))
    assert placed(prefill(waiting_tokens=500), decode(), both(), need=need).decode == "d"
    need = Need(prompt_tokens=5, max_tokens=5, avoid=frozenset({WorkerId("d")}))
    assert placed(prefill(), decode(), both(waiting_tokens=500), need=need).prefill == "b"


def test_what_fits_no_pool_at_all_is_not_worth_waiting_for() -> None:
    assert not refused(prefill(), decode(total_blocks=7, free_blocks=7)).full
    assert not refused(prefill(total_blocks=6), decode()).full


@pytest.mark.parametrize(
    "workers",
    [
        [],
        [prefill()],
        [decode()],
        [prefill(draining=True), decode()],
        [prefill(), decode(draining=True)],
        [prefill(), both(draining=True)],
    ],
)
def test_both_kinds_of_worker_are_needed_or_one_that_is_both(workers: list[WorkerView]) -> None:
    reason = refused(*workers)
    assert "worker" in reason.reason
    assert "role both" in reason.reason
    assert not reason.full


def test_one_token_needs_no_decode_worker() -> None:
    one = Need(prompt_tokens=5, max_tokens=1)
    assert placed(prefill(), need=one).decode is None
    assert placed(prefill(waiting_tokens=7), both(free_blocks=0), need=one).prefill == "b"
    assert "prefill" in refused(decode(), need=one).reason


def test_workers_of_different_models_are_no_pair() -> None:
    found = placed(prefill("p1", model_fingerprint="x"), prefill("p2", waiting_tokens=9), decode())
    assert (found.prefill, found.decode) == ("p2", "d")
    assert not refused(prefill(model_fingerprint="x"), decode(model_fingerprint="y")).full


def test_who_failed_before_is_asked_only_when_there_is_no_other() -> None:
    need = Need(prompt_tokens=5, max_tokens=5, avoid=frozenset({WorkerId("a"), WorkerId("d")}))
    found = placed(prefill("a"), prefill("b", waiting_tokens=99), decode("d"), decode("e", sequences=9), need=need)
    assert (found.prefill, found.decode) == ("b", "e")
    assert placed(prefill("a"), decode("d"), need=need).decode == "d"


@given(
    workers=st.lists(
        st.builds(
            view,
            st.sampled_from("abcdef"),
            st.sampled_from(Role),
            free_blocks=st.integers(-5, 100),
            waiting_tokens=st.integers(0, 100),
            sequences=st.integers(0, 9),
            draining=st.booleans(),
            model_fingerprint=st.sampled_from("fg"),
        ),
        unique_by=lambda worker: worker.worker_id,
    ),
    prompt=st.integers(1, 2000),
    max_tokens=st.integers(1, 2000),
)
def test_a_placement_is_always_one_that_can_work(workers: list[WorkerView], prompt: int, max_tokens: int) -> None:
    need = Need(prompt_tokens=prompt, max_tokens=max_tokens)
    found = place(need, workers)
    assert found.reason
    if isinstance(found, NoPlace):
        return
    by_id = {worker.worker_id: worker for worker in workers}
    source = by_id[found.prefill]
    assert source.role is not Role.DECODE
    assert not source.draining
    assert source.total_blocks * 16 >= prompt
    if found.decode is None:
        assert max_tokens == 1 or source.role is Role.BOTH
        if max_tokens > 1:
            assert source.free_blocks * 16 >= prompt + min(max_tokens - 1, PREDICTED_TOKENS)
            assert source.total_blocks * 16 >= prompt + max_tokens - 1
        return
    assert source.role is Role.PREFILL
    reader = by_id[found.decode]
    assert reader.role is Role.DECODE
    assert not reader.draining
    assert reader.model_fingerprint == source.model_fingerprint
    assert reader.free_blocks * 16 >= prompt + min(max_tokens - 1, PREDICTED_TOKENS)
    assert reader.total_blocks * 16 >= prompt + max_tokens - 1
