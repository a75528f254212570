"""`LLM` with an engine in this process: the smaller bundled model, in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import baton
from baton import LLM, SamplingParams
from baton.client import ChatMessage, Result
from baton.client.in_process import InProcess
from baton.core.errors import ConfigError, ContextExceeded, InvalidRequest
from baton.core.ids import SequenceId
from baton.core.request import FinishReason, Request, Sampling
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.ledger import Ledger
from baton.engine.step_result import StepResult

MODEL = Path(__file__).resolve().parents[3] / "models" / "baton-docs-1m"
PROMPTS = [
    "The list methods make it easy to",
    "A dictionary maps",
    "The with statement is used to wrap the execution of a block",
    "Return",
    "An iterator is an object that",
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, dtype="float32", kv_memory=64 << 20, max_batch=4) as made:
        yield made
        ledger_of(made).check()


def ledger_of(llm: LLM) -> Ledger:
    backend = llm._backend
    assert isinstance(backend, InProcess)
    return backend.offline.engine.ledger


def batch_of(llm: LLM) -> ContinuousBatch:
    backend = llm._backend
    assert isinstance(backend, InProcess)
    return backend.offline._batch


def reference(prompts: list[str], new_tokens: int) -> list[list[int]]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
        answers.append(found[0, ids.shape[1] :].tolist())
    return answers


def text(result: Result) -> str:
    return result.outputs[0].text


def test_greedy_answers_equal_those_of_transformers_in_the_order_of_the_prompts(llm: LLM) -> None:
    results = llm.generate(PROMPTS, GREEDY)
    assert [list(result.outputs[0].token_ids) for result in results] == reference(PROMPTS, 24)
    assert [result.prompt for result in results] == PROMPTS
    assert all(result.prompt_token_ids == tuple(llm.tokenize(result.prompt)) for result in results)
    assert ledger_of(llm).held_count == 0


def test_a_single_prompt_gives_a_list_of_one(llm: LLM) -> None:
    (result,) = llm.generate(PROMPTS[0], GREEDY)
    (output,) = result.outputs
    assert (output.index, output.finish_reason, output.stop_reason) == (0, FinishReason.LENGTH, None)
    assert result.text == output.text != ""
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(result.prompt_token_ids), 24)


def test_no_prompts_give_no_results(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_tokens_are_used_as_they_are(llm: LLM) -> None:
    ids = llm.tokenize(PROMPTS[0])
    one, same, pair = llm.generate(ids, GREEDY), llm.generate([ids], GREEDY), llm.generate([ids, PROMPTS[0]], GREEDY)
    assert one[0].outputs == same[0].outputs == pair[0].outputs == pair[1].outputs
    assert one[0].prompt == one[0].prompt_token_ids == tuple(ids)


def test_each_prompt_can_have_its_own_parameters(llm: LLM) -> None:
    lengths = [3, 30, 7, 1]
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    results = llm.generate([PROMPTS[0]] * 4, params)
    assert [len(result.outputs[0].token_ids) for result in results] == lengths
    longest = results[1].outputs[0].token_ids
    assert all(longest[: len(r.outputs[0].token_ids)] == r.outputs[0].token_ids for r in results)


def test_parameters_must_be_one_or_as_many_as_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="3 prompts and 2 sampling_params"):
        llm.generate(PROMPTS[:3], [GREEDY, GREEDY])


def test_n_answers_come_in_order_and_differ(llm: LLM) -> None:
    params = SamplingParams(n=5, max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)
    (result,) = llm.generate(PROMPTS[0], params)
    assert [output.index for output in result.outputs] == [0, 1, 2, 3, 4]
    assert len({output.token_ids for output in result.outputs}) > 1
    assert result.usage.completion_tokens == 60
    assert llm.generate(PROMPTS[0], params)[0].outputs == result.outputs, "the seed alone decides"


def test_an_engine_s_seed_gives_requests_theirs_so_that_a_program_repeats_itself(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    texts = []
    for seed in (3, 3, 4):
        with LLM(MODEL, dtype="float32", kv_memory=32 << 20, seed=seed) as seeded:
            texts.append([text(result) for result in seeded.generate([PROMPTS[0]] * 3, params)])
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1, "the same prompt three times is three different draws"


def test_a_stop_string_ends_the_answer_early_and_is_not_part_of_it(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], GREEDY)
    stop = text(whole)[10:14]
    (cut,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=stop))
    (output,) = cut.outputs
    assert output.text == text(whole)[: text(whole).index(stop)]
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, stop)
    assert len(output.token_ids) < 24
    assert output.token_ids == whole.outputs[0].token_ids[: len(output.token_ids)], "nothing after the stop"
    assert ledger_of(llm).held_count == 0


def test_a_stop_token_is_named_and_has_no_text(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], GREEDY)
    token = whole.outputs[0].token_ids[5]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=[token])
    (output,) = llm.generate(PROMPTS[0], params)[0].outputs
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, token)
    assert output.token_ids == whole.outputs[0].token_ids[: whole.outputs[0].token_ids.index(token) + 1]
    assert text(whole).startswith(output.text)


def test_log_probabilities_stand_beside_their_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
    (output,) = llm.generate(PROMPTS[0], params)[0].outputs
    assert len(output.logprobs) == 6
    assert [entry.top[0][0] for entry in output.logprobs] == list(output.token_ids), "greedy takes the best"


def test_log_probabilities_of_a_prompt_equal_those_of_transformers(llm: LLM) -> None:
    import transformers

    params = SamplingParams(temperature=0, max_tokens=3, n=3, prompt_logprobs=2)
    plain, asked = llm.generate([PROMPTS[2]] * 2, [GREEDY, params])
    assert plain.prompt_logprobs == ()
    ids = torch.tensor([asked.prompt_token_ids])
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.inference_mode():
        table = torch.log_softmax(model(ids).logits[0], -1)
    first, *others = asked.prompt_logprobs
    assert first is None
    assert len(others) == ids.shape[1] - 1
    for at, entry in enumerate(others):
        assert entry is not None
        assert entry.logprob == pytest.approx(float(table[at, ids[0, at + 1]]), abs=1e-4)
        assert [token for token, _ in entry.top] == table[at].topk(2).indices.tolist()


def test_prompts_with_a_common_beginning_find_it_in_the_cache(llm: LLM) -> None:
    shared = llm.tokenize(PROMPTS[2]) * 5
    results = llm.generate([[*shared, 20 + n] for n in range(6)], GREEDY)
    full = len(shared) // 16 * 16
    assert [result.usage.cached_tokens for result in results] == [0] + [full] * 5


def test_answers_are_the_same_where_blocks_run_out_and_sequences_are_put_back(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
    with LLM(MODEL, dtype="float32", kv_memory=300 << 10, max_model_len=256, max_batch=8) as tight:
        results = tight.generate(PROMPTS * 3, params)
        assert ledger_of(tight).held_count == 0
        preempted = batch_of(tight).preemptions
    assert preempted.swapped + preempted.recomputed > 0
    assert [result.outputs for result in results] == [result.outputs for result in llm.generate(PROMPTS * 3, params)]


def test_without_parameters_the_model_s_own_defaults_hold(llm: LLM) -> None:
    (result,) = llm.generate(PROMPTS[0])
    assert len(result.outputs[0].token_ids) <= 256


def test_a_conversation_is_rendered_by_the_model_s_template(llm: LLM) -> None:
    turns = [ChatMessage("user", "What is a list?")]
    (one,) = llm.chat(turns, GREEDY)
    same, plain = llm.chat([turns, [{"role": "user", "content": "What is a list?"}]], GREEDY)
    assert one.outputs == same.outputs == plain.outputs
    assert one.prompt == tuple(turns)
    assert one.prompt_token_ids == tuple(llm.tokenize(turns))
    with pytest.raises(InvalidRequest, match="list of chat messages"):
        llm.chat(["What is a list?"])  # type: ignore[list-item]


BAD: list[tuple[Any, type[Exception], str]] = [
    ("a" * 200_000, ContextExceeded, "tokens"),
    ([5] * 4096, ContextExceeded, "4096 tokens"),
    ([5, 4096], InvalidRequest, r"token_ids\[1\] is 4096"),
    ([-1], InvalidRequest, "-1"),
    ([0.5], InvalidRequest, "whole numbers"),
    ([], InvalidRequest, "not empty"),
    (17, InvalidRequest, "a prompt is text"),
    ([ChatMessage("wizard", "x")], InvalidRequest, "role must be one of"),
    ([{"role": "user"}], InvalidRequest, "a role and a content"),
    ("\ud800", InvalidRequest, "not valid Unicode"),
]


@pytest.mark.parametrize(("bad", "kind", "words"), BAD, ids=[str(case[0])[:20] for case in BAD])
def test_a_bad_prompt_is_refused_by_its_index_before_anything_runs(
    llm: LLM, bad: Any, kind: type[Exception], words: str
) -> None:
    before = ledger_of(llm).cached_count
    with pytest.raises(kind, match=rf"^prompts\[2\]: .*{words}"):
        llm.generate(["Never seen before, and long enough for a block or two of it.", "b", bad, "c"], GREEDY)
    assert ledger_of(llm).cached_count == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"n": 17}, "n must be"),
        ({"stop": ["", "a"]}, r"stop\[0\]"),
        ({"stop": [7]}, r"stop\[0\]"),
        ({"stop_token_ids": [4096]}, r"stop_token_ids\[0\]"),
        ({"seed": -1}, "seed"),
        ({"top_k": -1}, "top_k"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 1000.0}}, "logit_bias"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_bad_parameters_are_refused_by_the_prompt_s_index(llm: LLM, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^prompts\[1\]: .*{words}"):
        llm.generate(["a", "b"], [GREEDY, SamplingParams(**fields)])


def test_an_answer_that_does_not_fit_is_refused(llm: LLM) -> None:
    with pytest.raises(ContextExceeded, match=r"^prompts\[0\]: .*max_tokens is 4090"):
        llm.generate([[5] * 10], SamplingParams(max_tokens=4090))


def break_off_at(llm: LLM, step: int) -> None:
    """As Ctrl-C does, between two steps."""
    backend = llm._backend
    assert isinstance(backend, InProcess)
    steps = 0

    def count(result: StepResult) -> list[Any]:
        nonlocal steps
        steps += 1
        if steps == step:
            raise KeyboardInterrupt
        return []

    requests = [
        Request(sequence_id=SequenceId(f"{n}/0"), prompt=tuple(range(9, 40 + n)), sampling=Sampling(max_tokens=50))
        for n in range(9)
    ]
    backend.offline.run(requests, count)


@pytest.mark.parametrize("step", [1, 2, 5, 40])
def test_after_a_run_that_was_broken_off_every_block_is_back_and_the_next_one_runs(llm: LLM, step: int) -> None:
    before = llm.generate(PROMPTS, GREEDY)
    with pytest.raises(KeyboardInterrupt):
        break_off_at(llm, step)
    assert ledger_of(llm).held_count == 0
    ledger_of(llm).check()
    assert [result.outputs for result in llm.generate(PROMPTS, GREEDY)] == [result.outputs for result in before]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "toaster"}, "device is 'toaster'"),
        ({"policy": "whoever"}, "whoever"),
        ({"max_model_len": 5000}, "4096"),
        ({"kv_memory": 1 << 16}, "give more kv_memory"),
        ({"kv_memory": 1 << 50}, "not enough memory"),
        ({"tensor_parallel": 2}, "tensor_parallel is 2"),
        ({"model": "/no/such"}, "model /no/such: there is no such directory"),
        ({"address": "127.0.0.1:1", "threads": 2}, "the engines are the cluster's"),
    ],
)
def test_what_can_t_be_set_up_says_what_to_write_instead(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(**{"model": MODEL, **options})


def test_without_a_model_the_bundled_one_is_taken() -> None:
    with LLM(max_model_len=64, kv_memory=16 << 20) as bundled:
        assert bundled._backend.limits.name == "baton-docs-6m"
        assert bundled._backend.limits.max_model_len == 64


def test_the_package_names_what_it_hands_out() -> None:
    assert {"LLM", "SamplingParams", "Result"} <= set(baton.__all__)
    assert baton.Sampling is SamplingParams
