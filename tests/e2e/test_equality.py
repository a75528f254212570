"""Through the whole cluster, greedy float32 tokens are those of transformers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import grpc
import pytest
import torch

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

from ..near_ties import NearTies
from .cluster import Cluster
from .conftest import MODEL

NEW_TOKENS = 24


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
    prompt = prompts()[index]
    return greedy([prompt], NEW_TOKENS)[0, len(prompt) :].tolist()


def greedy(rows: list[list[int]], new_tokens: int, **settings: object) -> Any:
    """What the reference's `generate` gives for prompts of one length, so without padding; so many tokens each."""
    prompt = torch.tensor(rows)
    return reference_model().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        eos_token_id=None,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )


def logits_after(tokens: list[int]) -> list[float]:
    """The reference's, [V]."""
    with torch.inference_mode():
        return reference_model()(torch.tensor([tokens])).logits[0, -1].tolist()


def generate(stub: inference_pb2_grpc.InferenceServiceStub, index: int) -> list[int]:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompts()[index]),
        sampling=pb.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True),
    )
    return [token for r in stub.Generate(request, timeout=120) for output in r.outputs for token in output.token_ids]


def compare(near_ties: NearTies, name: object, prompt: list[int], tokens: list[int], expected: list[int]) -> None:
    """With the reference's greedy answer to that prompt."""
    near_ties.compare(name, tokens, expected, lambda position: logits_after(prompt + expected[:position]))


@pytest.mark.parametrize("at_once", [1, 16])
def test_greedy_tokens_equal_those_of_transformers(cluster: Cluster, at_once: int) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel, ThreadPoolExecutor(at_once) as pool:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answers = list(pool.map(lambda index: generate(stub, index), range(50)))
    near_ties = NearTies()
    for index, tokens in enumerate(answers):
        compare(near_ties, index, prompts()[index], tokens, reference(index))
    near_ties.report(f"{at_once} at once", most=2)


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
    near_ties, changed = NearTies(), 0
    for index, tokens in zip(chosen, answers, strict=True):
        out = greedy(
            [asked[index]], NEW_TOKENS, repetition_penalty=1.25, output_scores=True, return_dict_in_generate=True
        )
        expected = out.sequences[0, len(asked[index]) :].tolist()
        changed += expected != reference(index)
        near_ties.compare(index, tokens, expected, lambda at, scores=out.scores: scores[at][0].tolist())
    near_ties.report("with a repetition penalty", most=1)
    assert changed >= 5
