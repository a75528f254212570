"""`LLM` by the address of a cluster, against a router in the test's own process."""

import asyncio

import grpc
import pytest

from baton import LLM, Result, SamplingParams
from baton.client import Usage
from baton.core.errors import BatonError, ConfigError, ContextExceeded, InvalidRequest, Unavailable, UnknownModel
from baton.core.request import FinishReason
from baton.v1 import inference_pb2 as pb

from .scripted_router import Break, ScriptedRouter, message


def answers(*texts: str) -> list[list[pb.GenerateResponse | Break]]:
    return [[message(1, text), message(1, last=True)] for text in texts]


def texts(results: list[Result]) -> list[str]:
    return [result.text for result in results]


def test_results_are_in_the_order_of_the_prompts(router: ScriptedRouter, address: str) -> None:
    router.scripts = answers("one", "two", "three")
    with LLM(address=address, max_in_flight=1) as llm:
        results = llm.generate(["a", "bb", "ccc"], SamplingParams(max_tokens=4))
    assert texts(results) == ["one", "two", "three"]
    assert [result.prompt for result in results] == ["a", "bb", "ccc"]
    assert [result.prompt_token_ids for result in results] == [(0,), (0, 1), (0, 1, 2)]
    assert results[0].usage == Usage(prompt_tokens=3, completion_tokens=1, cached_tokens=0)
    assert results[0].outputs[0].finish_reason is FinishReason.STOP


def test_with_many_in_flight_each_prompt_gets_its_own_answer(router: ScriptedRouter, address: str) -> None:
    """The router's threads take the scripts as they come, so each says which request it was."""
    router.scripts = answers(*["x"] * 40)
    with LLM(address=address) as llm:
        results = llm.generate([[n] for n in range(40)])
    assert [result.prompt_token_ids for result in results] == [(n,) for n in range(40)]
    assert sorted(request.token_ids.ids[0] for request in router.asked) == list(range(40))


def test_a_prompt_is_tokenised_once_and_runs_as_tokens(router: ScriptedRouter, address: str) -> None:
    router.scripts = answers("x", "x")
    with LLM(address=address, api_key="k", max_in_flight=1) as llm:
        llm.generate("abc")
        llm.chat([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}])
        assert llm.tokenize("ab") == [0, 1]
    assert [list(request.token_ids.ids) for request in router.asked] == [[0, 1, 2], [0, 1]]
    assert router.metadata[0]["authorization"] == "Bearer k"


def test_parameters_and_seeds_go_along_and_a_seeded_program_repeats_itself(
    router: ScriptedRouter, address: str
) -> None:
    router.scripts = answers(*["x"] * 5)
    for _ in range(2):
        with LLM(address=address, max_in_flight=1, seed=11) as llm:
            llm.generate(["a", "b"], SamplingParams(top_k=3, stop="end"))
    seeds = [request.sampling.seed for request in router.asked]
    assert seeds[:2] == seeds[2:]
    assert seeds[0] != seeds[1]
    assert (router.asked[0].sampling.top_k, list(router.asked[0].sampling.stop)) == (3, ["end"])
    with LLM(address=address) as llm:
        llm.generate("a", SamplingParams(seed=5))
    assert router.asked[-1].sampling.seed == 5


def test_what_the_limits_forbid_is_refused_before_anything_runs(router: ScriptedRouter, address: str) -> None:
    with LLM(address=address) as llm:
        with pytest.raises(ContextExceeded, match=r"^prompts\[1\]: .*the prompt has 500 tokens"):
            llm.generate(["a", "b" * 500])
        with pytest.raises(InvalidRequest, match=r"^prompts\[1\]: token_ids\[0\] is 1000"):
            llm.generate(["a", [1000]])
        with pytest.raises(InvalidRequest, match=r"^prompts\[0\]: temperature"):
            llm.generate(["a"], SamplingParams(temperature=-1))
    assert router.asked == []


def test_a_broken_stream_is_asked_for_again(router: ScriptedRouter, address: str) -> None:
    router.scripts = [
        [message(1, "a"), Break(grpc.StatusCode.UNAVAILABLE)],
        [message(2, "b"), message(2, last=True)],
    ]
    with LLM(address=address) as llm:
        assert texts(llm.generate("x")) == ["ab"]


def test_when_one_fails_the_others_end_and_the_next_call_runs(router: ScriptedRouter, address: str) -> None:
    router.scripts = [*answers("one"), [Break(grpc.StatusCode.OUT_OF_RANGE, "too long")], *answers("later")]
    with LLM(address=address, max_in_flight=1) as llm:
        with pytest.raises(ContextExceeded, match=r"^prompts\[1\]: too long"):
            llm.generate(["a", "b", "c"])
        assert len(router.asked) == 2
        assert texts(llm.generate("d")) == ["later"]


def test_a_stop_token_that_was_asked_for_is_named(router: ScriptedRouter, address: str) -> None:
    router.scripts = answers("x", "x")
    with LLM(address=address, max_in_flight=1) as llm:
        (named,) = llm.generate("a", SamplingParams(stop_token_ids=[1]))
        (other,) = llm.generate("a", SamplingParams(stop_token_ids=[2]))
    assert named.outputs[0].stop_reason == 1
    assert other.outputs[0].stop_reason is None


def test_n_answers_keep_their_index(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(1, "b", index=1), message(2, "a", index=0), message(2, last=True)]]
    router.scripts[0].insert(2, pb.GenerateResponse(seq=2, outputs=[pb.Output(index=1, finish_reason=1)]))
    with LLM(address=address) as llm:
        (result,) = llm.generate("x", SamplingParams(n=2))
    assert [(output.index, output.text) for output in result.outputs] == [(0, "a"), (1, "b")]


async def test_it_runs_where_an_event_loop_runs_already(router: ScriptedRouter, address: str) -> None:
    router.scripts = answers("x")
    assert asyncio.get_running_loop().is_running()
    with LLM(address=address) as llm:
        assert texts(llm.generate("a")) == ["x"]


def test_a_cluster_without_workers_or_without_the_model_says_so(router: ScriptedRouter, address: str) -> None:
    with LLM("nope", address=address) as llm, pytest.raises(UnknownModel):
        llm.generate("a")
    router.max_model_len = 0
    with LLM(address=address) as llm, pytest.raises(Unavailable, match="workers"):
        llm.generate("a")


def test_after_close_nothing_runs_and_closing_again_changes_nothing(address: str) -> None:
    llm = LLM(address=address)
    llm.close()
    llm.close()
    with pytest.raises(BatonError, match="closed"):
        llm.generate("a")
    with pytest.raises(ConfigError, match="max_in_flight"):
        LLM(address=address, max_in_flight=0)
