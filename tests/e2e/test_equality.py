"""Through the whole cluster, greedy float32 tokens are those of transformers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import grpc
import pytest
import torch

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

from .cluster import Cluster
from .conftest import MODEL

NEW_TOKENS = 24
EPSILON = 1e-4  # two best logits closer than this are a tie: which one wins is rounding


@cache
def reference_model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@cache
def prompts() -> list[list[int]]:
    """50 prompts of 1 to 700 tokens, cut from real text."""
    from transformers import AutoTokenizer

    text = (MODEL / "README.md").read_text() + (MODEL / "../../README.md").read_text()
    tokens = AutoTokenizer.from_pretrained(MODEL)(text, add_special_tokens=False)["input_ids"]
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 699, 700] + [1 + (i * 137) % 520 for i in range(40)]
    starts = [(i * 53) % max(1, len(tokens) - 100) for i in range(50)]
    return [(tokens[start:] * 12)[:length] for start, length in zip(starts, lengths, strict=True)]


@cache
def reference(index: int) -> list[int]:
    prompt = torch.tensor([prompts()[index]])
    out = reference_model().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].tolist()


def margin(index: int, position: int) -> float:
    """How far the reference's two best logits lie apart where it chose its token `position`."""
    tokens = prompts()[index] + reference(index)[:position]
    with torch.inference_mode():
        best = reference_model()(torch.tensor([tokens])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def generate(stub: inference_pb2_grpc.InferenceServiceStub, index: int) -> list[int]:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompts()[index]),
        sampling=pb.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True),
    )
    return [token for r in stub.Generate(request, timeout=120) for output in r.outputs for token in output.token_ids]


def check(index: int, tokens: list[int]) -> int:
    """1 if the answer left the reference at a near-tie, 0 if it is equal; anything else fails."""
    expected = reference(index)
    if tokens == expected:
        return 0
    assert len(tokens) == len(expected)
    position = next(i for i, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1])
    gap = margin(index, position)
    assert gap < EPSILON, f"prompt {index} differs at token {position}, where the reference's margin is {gap}"
    return 1


@pytest.mark.parametrize("at_once", [1, 16])
def test_greedy_tokens_equal_those_of_transformers(cluster: Cluster, at_once: int) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel, ThreadPoolExecutor(at_once) as pool:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answers = list(pool.map(lambda index: generate(stub, index), range(50)))
    near_ties = sum(check(index, tokens) for index, tokens in enumerate(answers))
    print(f"{at_once} at once: 50 prompts, {near_ties} near-ties under {EPSILON}")
    assert near_ties <= 2


def test_with_a_repetition_penalty_too(cluster: Cluster) -> None:
    """Prefill penalises token 0, decode the rest: neither may lose count."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, repetition_penalty=1.25)
    asked, chosen = prompts(), range(1, 50, 5)

    def answer(index: int) -> list[int]:
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=asked[index]), sampling=sampling)
        return [
            token for r in stub.Generate(request, timeout=120) for output in r.outputs for token in output.token_ids
        ]

    with grpc.insecure_channel(cluster.grpc_address) as channel, ThreadPoolExecutor(8) as pool:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answers = list(pool.map(answer, chosen))
    near_ties = changed = 0
    for index, tokens in zip(chosen, answers, strict=True):
        prompt = torch.tensor([asked[index]])
        out = reference_model().generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=1.25,
            output_scores=True,
            return_dict_in_generate=True,
        )
        expected = out.sequences[0, prompt.shape[1] :].tolist()
        changed += expected != reference(index)
        if tokens != expected:
            position = next(i for i, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1])
            best = out.scores[position][0].topk(2).values
            assert float(best[0] - best[1]) < EPSILON, f"prompt {index} differs at token {position}"
            near_ties += 1
    assert near_ties <= 1
    assert changed >= 5
