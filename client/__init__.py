"""Baton's Python client: `InferenceClient` for threads, `AsyncInferenceClient` for asyncio.

    with InferenceClient("127.0.0.1:50051") as client:
        print(client.generate("A dictionary maps", sampling=Sampling(max_tokens=32)).text)
        for message in client.stream("The with statement"):
            print(message.text, end="")

Errors are the classes of `baton.core.errors`, and `ServerFault` for a defect of the server, `NoAnswer` (an
`Unavailable`) where no server is.

`LLM` (llm.py) runs lists of prompts, in this process or by a cluster. It is not named here, as it loads far more than
the clients do.
"""

from .aio import AsyncInferenceClient
from .errors import NoAnswer, ServerFault
from .results import (
    Answer,
    ChatMessage,
    Completion,
    Explanation,
    Generation,
    Message,
    ModelInfo,
    Output,
    Prompt,
    PromptLogprob,
    Result,
    Sampling,
    SamplingParams,
    TokenLogprobs,
    Usage,
    Worker,
)
from .retry import Retry
from .sync import InferenceClient

__all__ = [
    "Answer",
    "AsyncInferenceClient",
    "ChatMessage",
    "Completion",
    "Explanation",
    "Generation",
    "InferenceClient",
    "Message",
    "ModelInfo",
    "NoAnswer",
    "Output",
    "Prompt",
    "PromptLogprob",
    "Result",
    "Retry",
    "Sampling",
    "SamplingParams",
    "ServerFault",
    "TokenLogprobs",
    "Usage",
    "Worker",
]
