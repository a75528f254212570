"""The commands that ask a running cluster: generate, chat, status, models."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..client import ChatMessage, InferenceClient, Message, NoAnswer, Sampling
from ..core.errors import BatonError, ConfigError, Unavailable
from .config import DEFAULT_ADDRESS


def generate(arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    with _client(arguments) as client:
        _print_stream(client.stream(text, model=arguments.model, sampling=_sampling(arguments)))
    print()
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Reads questions until the end of input. A failed question is forgotten, so that the next can be asked."""
    start = [ChatMessage("system", arguments.system)] if arguments.system else []
    said = list(start)
    with _client(arguments) as client:
        while True:
            question = _ask_person()
            if question is None or question == "/quit":
                return 0
            if question == "/new":
                said = list(start)
                continue
            if not question:
                continue
            turn = [*said, ChatMessage("user", question)]
            try:
                answer = _print_stream(client.stream(turn, model=arguments.model, sampling=_sampling(arguments)))
            except BatonError as error:
                print(f"baton: {_no_router(arguments) if isinstance(error, NoAnswer) else error}", file=sys.stderr)
                continue
            print()
            said = [*turn, ChatMessage("assistant", answer)]


def status(arguments: argparse.Namespace) -> int:
    """0: every model has its workers; 1: the router answers, but workers are missing."""
    with _client(arguments) as client:
        served = client.models()
        print(f"router   {_address(arguments)}  answers")
        for model in served:
            print(f"model    {model.name}  {'ready' if model.ready else 'waits for its workers'}")
            for worker in client.workers(model.name):
                print(
                    f"worker   {worker.worker_id}  {worker.role}{', draining' if worker.draining else ''}: "
                    f"{worker.running} running, {worker.waiting} waiting, "
                    f"{worker.free_blocks} of {worker.total_blocks} KV blocks free"
                )
    return 0 if all(model.ready for model in served) else 1


def models(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        served = client.models()
    rows = [("NAME", "CONTEXT", "DTYPE", "READY")]
    rows += [(m.name, str(m.max_model_len), m.dtype, "yes" if m.ready else "no") for m in served]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _address(arguments: argparse.Namespace) -> str:
    return str(arguments.address or os.environ.get("BATON_ADDRESS") or DEFAULT_ADDRESS)


@contextmanager
def _client(arguments: argparse.Namespace) -> Iterator[InferenceClient]:
    """A client of the router that is named. Raises Unavailable with what to do when no router is there."""
    with _open(arguments) as client:
        try:
            yield client
        except NoAnswer:
            raise _no_router(arguments) from None


def _no_router(arguments: argparse.Namespace) -> Unavailable:
    return Unavailable(f"No router answers at {_address(arguments)}: start one with `baton serve`, or give --address.")


def _open(arguments: argparse.Namespace) -> InferenceClient:
    certificate = None
    if arguments.tls_ca:
        try:
            with open(arguments.tls_ca, "rb") as file:
                certificate = file.read()
        except OSError as error:
            raise ConfigError(f"--tls-ca {arguments.tls_ca} can't be read: {error.strerror}.") from None
    return InferenceClient(
        _address(arguments),
        api_key=os.environ.get("BATON_API_KEY") or None,
        tls_ca=certificate,
        timeout_s=arguments.timeout,
    )


def _sampling(arguments: argparse.Namespace) -> Sampling:
    return Sampling(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        min_tokens=arguments.min_tokens,
        seed=arguments.seed,
        stop=tuple(arguments.stop or ()),
    )


def _print_stream(messages: Iterable[Message]) -> str:
    """Print the first answer as it comes; give its whole text."""
    text = ""
    for message in messages:
        for output in message.outputs:
            if output.index == 0 and output.text:
                text += output.text
                sys.stdout.write(output.text)
                sys.stdout.flush()
    return text


def _ask_person() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
