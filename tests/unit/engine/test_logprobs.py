"""Logprobs of the answer's and the prompt's tokens."""

import pytest
import torch

from baton.core.request import TokenLogprobs
from baton.engine.logprobs import PromptLogprobs, ranked_logprobs

VOCAB = 50


def some_logits(count: int) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(3)) * 3


def by_softmax(logits: torch.Tensor, token_ids: list[int], count: int) -> list[TokenLogprobs]:
    found = []
    for row, token in zip(torch.log_softmax(logits.double(), -1), token_ids, strict=True):
        best = sorted(range(len(row)), key=lambda other: (-float(row[other]), other))[:count]
        found.append(TokenLogprobs(float(row[token]), tuple((other, float(row[other])) for other in best)))
    return found


def assert_near(found: TokenLogprobs | None, expected: TokenLogprobs) -> None:
    assert found is not None
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [token for token, _ in found.top] == [token for token, _ in expected.top]
    assert [value for _, value in found.top] == pytest.approx([value for _, value in expected.top], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 5, VOCAB, VOCAB + 9])
def test_they_are_the_log_softmaxs_and_ties_go_by_id(dtype: torch.dtype, count: int) -> None:
    logits = some_logits(30).to(dtype)
    token_ids = [row * 7 % VOCAB for row in range(30)]
    found = ranked_logprobs(logits, torch.tensor(token_ids), count).to_host().result()
    for one, other in zip(found, by_softmax(logits, token_ids, min(count, VOCAB)), strict=True):
        assert_near(one, other)


def test_each_row_gets_as_many_of_the_best_as_it_asked_for() -> None:
    found = ranked_logprobs(some_logits(3), torch.tensor([1, 2, 3]), 4).to_host().result([0, 4, 2])
    assert [len(entry.top) for entry in found] == [0, 4, 2]


def test_a_row_of_large_logits_is_as_exact_as_one_of_small() -> None:
    logits = some_logits(1)
    near, far = (
        ranked_logprobs(logits + shift, torch.tensor([4]), 3).to_host().result()[0].logprob for shift in (0, 4096)
    )
    assert far == pytest.approx(near, abs=1e-3)


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 17, 40])
def test_a_prompts_logprobs_do_not_depend_on_its_chunks(chunk: int) -> None:
    """The logits at each token of the prompt speak of the next; those at the last speak of the answer."""
    prompt = [(5 * at + 3) % VOCAB for at in range(17)]
    logits = some_logits(len(prompt))
    expected = by_softmax(logits[:-1], prompt[1:], 2)
    known = PromptLogprobs(len(prompt))
    for start in range(0, len(prompt), chunk):
        following = prompt[start + 1 : start + chunk + 1]
        rows = logits[start : start + len(following)]
        known.add(start + 1, ranked_logprobs(rows, torch.tensor(following, dtype=torch.long), 2).to_host().result())
    assert known.complete
    first, *others = known.result()
    assert first is None
    assert len(others) == 16
    for one, other in zip(others, expected, strict=True):
        assert_near(one, other)


def test_a_prompt_of_one_token_has_none_and_is_complete() -> None:
    assert PromptLogprobs(1).result() == (None,)


def test_chunks_out_of_order_or_beyond_the_prompt_are_refused() -> None:
    known = PromptLogprobs(3)
    entry = TokenLogprobs(-1.0)
    with pytest.raises(AssertionError, match="token 2 comes where 1 is next"):
        known.add(2, [entry])
    with pytest.raises(AssertionError, match="more logprobs"):
        known.add(1, [entry] * 3)
    with pytest.raises(AssertionError, match="1 of 3 tokens"):
        known.result()
