"""Workers that do both, and workers of any kind whose blocks run out: the answers stay those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import grpc
import httpx
import pytest

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

from ..near_ties import NearTies
from .cluster import Cluster, serve
from .conftest import MODEL
from .ledgers import assert_clean, workers
from .test_equality import compare, generate, greedy, prompts, reference

AT_ONCE = 16
PROMPT_TOKENS, NEW_TOKENS = 24, 130  # 10 blocks each at the end: four fill a pool, and seven are let in
TIGHT = ("--max-model-len", "736", "--kv-memory", "4521984", "--max-batch", "16")  # 46 blocks of 96 KiB


@pytest.fixture(scope="module")
def colocated(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Cluster]:
    flags = ["--model", str(MODEL), "--dtype", "float32", "--device", device, "--both", "1", *TIGHT]
    with serve(tmp_path_factory.mktemp("colocated"), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Cluster]:
    """A pair without swap memory, so that what is preempted is computed again."""
    flags = ["--model", str(MODEL), "--dtype", "float32", "--device", device, "--swap-memory", "0", *TIGHT]
    with serve(tmp_path_factory.mktemp("tight"), *flags) as running:
        yield running


@cache
def crowd() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of one length, and the reference's answers to them: of one batch, as no padding is needed."""
    asked = [prompt[:PROMPT_TOKENS] for prompt in prompts() if len(prompt) >= PROMPT_TOKENS][:AT_ONCE]
    return asked, greedy(asked, NEW_TOKENS)[:, PROMPT_TOKENS:].tolist()


def ask(cluster: Cluster, prompt: list[int], **sampling: object) -> list[int]:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(ignore_eos=True, **sampling)
    )
    with cluster.channel() as channel:
        answers = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=120)
        return [token for answer in answers for output in answer.outputs for token in output.token_ids]


def preemptions(cluster: Cluster) -> dict[str, float]:
    """Over all workers, by way."""
    found = {"swap": 0.0, "recompute": 0.0}
    for record in workers(cluster).values():
        for line in httpx.get(f"http://{record.metrics_address}/metrics").text.splitlines():
            for way in found:
                if line.startswith(f'baton_worker_preemptions_total{{kind="{way}"}}'):
                    found[way] += float(line.rsplit(" ", 1)[1])
    return found


def test_greedy_tokens_of_a_worker_that_does_both_equal_those_of_transformers(colocated: Cluster) -> None:
    chosen = range(0, 16, 2)
    prompts()  # here, as transformers does not like to be imported by several threads at once
    with grpc.insecure_channel(colocated.grpc_address) as channel, ThreadPoolExecutor(5) as pool:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answers = list(pool.map(lambda index: generate(stub, index), chosen))
    near_ties = NearTies()
    for index, tokens in zip(chosen, answers, strict=True):
        compare(near_ties, index, prompts()[index], tokens, reference(index))
    near_ties.report("a worker that does both", most=1)


def test_a_seed_draws_the_same_tokens_colocated_and_disaggregated(cluster: Cluster, colocated: Cluster) -> None:
    for number in range(3):
        prompt = prompts()[number * 3 + 1]
        one, other = (
            ask(where, prompt, temperature=1.1, top_p=0.9, presence_penalty=0.5, seed=number, max_tokens=24)
            for where in (cluster, colocated)
        )
        assert len(one) == 24
        assert one == other


@pytest.mark.parametrize("kind", ["colocated", "tight"])
def test_answers_that_were_preempted_equal_those_of_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    asked, expected = crowd()
    before = preemptions(cluster)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda prompt: ask(cluster, prompt, temperature=0, max_tokens=NEW_TOKENS), asked))
    counts = {way: after - before[way] for way, after in preemptions(cluster).items()}
    near_ties = NearTies()
    for number, answer in enumerate(zip(asked, answers, expected, strict=True)):
        compare(near_ties, number, *answer)
    near_ties.report(f"{kind}, preempted {counts}", most=1)
    assert sum(counts.values()) > 0
    assert counts["swap"] > 0 or kind == "tight"
    assert counts["swap"] == 0 or kind == "colocated"
    assert_clean(cluster)


def test_a_storm_of_cancels_leaves_every_block_free_on_workers_that_preempt(colocated: Cluster, tight: Cluster) -> None:
    asked, _ = crowd()

    def cancelled(number: int) -> bool:
        """Reads a few tokens, and leaves; every fourth stays."""
        cluster = (colocated, tight)[number % 2]
        sampling = pb.SamplingParams(max_tokens=30 + number, ignore_eos=True, n=1 + (number % 5 == 0))
        with cluster.channel() as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
                pb.GenerateRequest(token_ids=pb.TokenIds(ids=asked[number % AT_ONCE]), sampling=sampling), timeout=120
            )
            for read, response in enumerate(call):
                if number % 8 > 1 and read >= number % 11:
                    call.cancel()
                    return True
                if response.HasField("usage"):
                    return False
        raise AssertionError("the stream broke off")

    with ThreadPoolExecutor(24) as pool:
        ends = list(pool.map(cancelled, range(40)))
    assert ends.count(False) >= 8
    assert ends.count(True) >= 16
    for cluster in (colocated, tight):
        assert_clean(cluster)
