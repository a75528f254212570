"""A storm of cancelled requests leaves nothing behind."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

from . import ray_objects
from .cluster import Cluster
from .ledgers import assert_clean

REQUESTS = 200
AT_ONCE = 16


def one_request(stub: inference_pb2_grpc.InferenceServiceStub, number: int) -> str:
    """Runs one request and says how its stream ended. Every third is cancelled, half of those by the Cancel RPC."""
    dice = random.Random(number)
    prompt = [dice.randrange(300, 4000) for _ in range(dice.randint(1, 400))]
    sampling = pb.SamplingParams(max_tokens=dice.randint(1, 60), temperature=0.7, seed=number, n=1 + (number % 10 == 0))
    if number % 3 == 0:  # long enough that a fast machine has not ended it before it is cancelled
        sampling.max_tokens, sampling.ignore_eos = 600, True
    name = f"storm-{number}"
    call = stub.Generate(
        pb.GenerateRequest(request_id=name, token_ids=pb.TokenIds(ids=prompt), sampling=sampling), timeout=120
    )
    by_rpc = number % 6 == 0
    timer = None
    if number % 3 == 0:
        cancel = (lambda: stub.Cancel(pb.CancelRequest(request_id=name), timeout=60)) if by_rpc else call.cancel
        timer = threading.Timer(dice.uniform(0, 0.6), cancel)
        timer.start()
    terminals = 0
    reasons = set()
    try:
        for response in call:
            assert not terminals, "something came after the terminal message"
            terminals += response.HasField("usage")
            reasons |= {output.finish_reason for output in response.outputs if output.finish_reason}
    except grpc.RpcError as error:
        assert number % 3 == 0, error
        assert not by_rpc, error
        assert error.code() == grpc.StatusCode.CANCELLED, error
        assert not terminals
        return "cancelled by the client"
    finally:
        if timer:
            timer.join()
    assert terminals == 1
    assert reasons
    return "cancelled by the router" if pb.FINISH_REASON_CANCELLED in reasons else "finished"


def test_200_requests_a_third_cancelled_leave_every_block_free(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel, ThreadPoolExecutor(AT_ONCE) as pool:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        ends = list(pool.map(lambda number: one_request(stub, number), range(REQUESTS)))
    counts = {end: ends.count(end) for end in sorted(set(ends))}
    print(counts)
    assert len(ends) == REQUESTS
    assert counts["finished"] >= REQUESTS // 2
    assert counts.get("cancelled by the client", 0) >= 10
    assert counts.get("cancelled by the router", 0) >= 10
    assert_clean(cluster)
    ray_objects.assert_none(cluster)


def test_a_passed_deadline_ends_the_request_and_frees_its_blocks(
    cluster: Cluster, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    request = pb.GenerateRequest(
        text="The string methods", sampling=pb.SamplingParams(max_tokens=3000, ignore_eos=True)
    )
    try:
        list(stub.Generate(request, timeout=0.5))
        raise AssertionError("3,000 tokens in half a second")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert_clean(cluster)
