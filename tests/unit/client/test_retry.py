import grpc
from hypothesis import given
from hypothesis import strategies as st

from baton.client.errors import from_status
from baton.client.results import Message, Output, Usage
from baton.client.retry import Retry, StreamProgress
from baton.core.errors import InvalidRequest, Overloaded, Unavailable


def message(seq: int, *, tokens: int = 1, last: bool = False) -> Message:
    ids = tuple(range(seq - tokens, seq))
    usage = Usage(prompt_tokens=1, completion_tokens=seq, cached_tokens=0) if last else None
    return Message(request_id="r", seq=seq, outputs=(Output(index=0, text="x", token_ids=ids),), usage=usage)


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 30))
def test_whatever_is_sent_again_each_token_shows_once_and_in_order(restarts: list[int], total: int) -> None:
    progress = StreamProgress(Retry(), 1)
    shown: list[int] = []
    for start in [*restarts, 0]:  # each try sends from its start again, breaks off, and the last one ends
        last_try = start == 0
        for seq in range(min(start, progress.seq) + 1, total + 1):
            taken = progress.take(message(seq, last=last_try and seq == total))
            shown += [token for output in taken.outputs for token in output.token_ids] if taken else []
    assert shown == list(range(total))
    assert progress.ended


def test_only_being_away_or_full_is_worth_another_try() -> None:
    progress = StreamProgress(Retry(), 1)
    assert progress.after(Unavailable("")) is not None
    assert progress.after(Overloaded("")) is not None
    assert progress.after(InvalidRequest("")) is None


def test_a_full_server_is_left_alone_for_as_long_as_it_asks() -> None:
    full = from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", [("retry-after-ms", "1500")])
    assert StreamProgress(Retry(most_s=0), 1).after(full) == 1.5


def test_progress_forgives_the_failures_before_it() -> None:
    progress = StreamProgress(Retry(tries=2), 1)
    for seq in range(1, 20):
        assert progress.after(Unavailable("")) is not None
        progress.take(message(seq))


@given(st.integers(1, 50))
def test_the_wait_stays_within_its_bound(failures: int) -> None:
    assert 0 <= Retry(most_s=2.0).delay_s(failures) <= 2.0
