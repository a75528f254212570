"""Baton serves large language models with prefill and decode on different workers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import (
        AsyncInferenceClient,
        ChatMessage,
        Completion,
        InferenceClient,
        Result,
        Sampling,
        SamplingParams,
    )
    from .client.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncInferenceClient",
    "ChatMessage",
    "Completion",
    "InferenceClient",
    "Result",
    "Sampling",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Names of the client, loaded when they are first asked for: `import baton` itself costs nothing."""
    if name == "LLM":
        return import_module(".client.llm", __name__).LLM
    if name in __all__:
        return getattr(import_module(".client", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
