"""A router in the test's own process that says what a test tells it to."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc as rpc


@dataclass
class Break:
    """The stream ends here with this status."""

    code: grpc.StatusCode
    details: str = "broken on purpose"
    name: str = ""  # of the error, in the trailing metadata


Step = pb.GenerateResponse | Break


@dataclass
class ScriptedRouter(rpc.InferenceServiceServicer):
    """Each call of Generate plays the next script and notes what it was asked."""

    scripts: list[list[Step]] = field(default_factory=list)
    asked: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    unavailable: int = 0  # how many unary calls fail first
    max_model_len: int = 128

    def Generate(self, request, context):
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        for step in self.scripts.pop(0):
            if isinstance(step, Break):
                if step.name:
                    context.set_trailing_metadata((("baton-error", step.name),))
                context.abort(step.code, step.details)
            yield step

    def ListModels(self, request, context):
        if self.unavailable > 0:
            self.unavailable -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return pb.ListModelsResponse(models=[pb.Model(name="m", max_model_len=128, ready=True)])

    def GetModel(self, request, context):
        if request.model not in ("", "m"):
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.model}")
        worker = pb.Worker(worker_id="decode-0", role="decode", running=2, waiting=1, free_blocks=5, total_blocks=8)
        model = pb.Model(name="m", max_model_len=self.max_model_len, vocab_size=1000, ready=True)
        return pb.GetModelResponse(model=model, workers=[worker])

    def Tokenize(self, request, context):
        count = len(request.chat.messages) if request.HasField("chat") else len(request.text)
        return pb.TokenizeResponse(token_ids=range(count))

    def Detokenize(self, request, context):
        return pb.DetokenizeResponse(text=" ".join(map(str, request.token_ids)))

    def Cancel(self, request, context):
        self.cancelled.append(request.request_id)
        return pb.CancelResponse(found=request.request_id == "known")

    def Explain(self, request, context):
        if request.request_id != "known":
            context.set_trailing_metadata((("baton-error", "UnknownRequest"),))
            context.abort(grpc.StatusCode.NOT_FOUND, "no such request")
        return pb.ExplainResponse(request_id="known", state="finished", decode_worker="decode-0")


def message(seq: int, text: str = "", *, last: bool = False, index: int = 0) -> pb.GenerateResponse:
    """One token more, or the end."""
    output = pb.Output(index=index, text=text, token_ids=[seq] if text else [])
    if last:
        output.finish_reason = pb.FINISH_REASON_STOP
    usage = pb.Usage(prompt_tokens=3, completion_tokens=seq) if last else None
    return pb.GenerateResponse(request_id="r", seq=seq, outputs=[output], usage=usage)


@contextmanager
def serving(router: ScriptedRouter) -> Iterator[str]:
    """The address of a real gRPC server that answers with it."""
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        rpc.add_InferenceServiceServicer_to_server(router, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(0).wait()
