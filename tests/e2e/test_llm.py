"""`LLM` answers the same by the address of a cluster as with an engine in this process."""

from __future__ import annotations

from baton import LLM, ChatMessage, SamplingParams

from .cluster import Cluster
from .conftest import MODEL

PROMPTS = ["The list methods make it easy to", "A dictionary maps", [20, 21, 22], "The with statement", "Return"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=32, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.02, max_tokens=24, n=3),  # seeds are the LLM's own
    SamplingParams(seed=5, max_tokens=24, logit_bias={30: 1.1}, presence_penalty=0.3, stop=(" the", ".")),
    SamplingParams(temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=1),
    SamplingParams(max_tokens=40),
]


def test_both_ways_give_the_same_results_for_the_same_seed(cluster: Cluster) -> None:
    with LLM(address=cluster.grpc_address, seed=9) as there, LLM(MODEL, dtype="float32", seed=9) as here:
        pairs = zip(there.generate(PROMPTS, PARAMS), here.generate(PROMPTS, PARAMS), strict=True)
        for asked, own in pairs:
            assert (asked.prompt, asked.prompt_token_ids) == (own.prompt, own.prompt_token_ids)
            for mine, other in zip(own.outputs, asked.outputs, strict=True):
                assert (mine.index, mine.text, mine.token_ids) == (other.index, other.text, other.token_ids)
                assert mine.finish_reason == other.finish_reason
                assert len(mine.logprobs) == len(other.logprobs)
            assert len(asked.prompt_logprobs) == len(own.prompt_logprobs)
            assert asked.usage.completion_tokens == own.usage.completion_tokens
        turns = [ChatMessage("user", "What is a list?")]
        assert there.chat(turns, PARAMS[0])[0].text == here.chat(turns, PARAMS[0])[0].text


def test_a_long_list_goes_through_with_many_in_flight(cluster: Cluster) -> None:
    prompts = [[20 + n % 50, 30 + n // 50] for n in range(400)]
    with LLM(address=cluster.grpc_address) as llm:
        results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert [result.prompt_token_ids for result in results] == [tuple(prompt) for prompt in prompts]
    assert all(result.usage.completion_tokens == 2 for result in results)
