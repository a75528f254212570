"""The commands that ask a running cluster: generate, chat, status, models."""

import argparse
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own log is for no person; it is read when gRPC is imported

from ..client import ChatMessage, InferenceClient, Message, NoAnswer, Prompt, Sampling, Worker
from ..core.errors import BatonError, ConfigError, ContextExceeded, DeadlineExceeded, Unavailable
from ..core.request import MAX_PRIORITY
from .config import DEFAULT_ADDRESS

WAITING_S = 1.0  # without a word of the answer, before it is said that workers are missing
_MOST = {"max_tokens": 2**32 - 1, "top_k": 2**32 - 1, "seed": 2**64 - 1}  # what the fields of a request hold
_HELP = """\
/new    forgets what was said
/help   shows this
/quit   ends the chat, as Ctrl-D does
Ctrl-C  stops an answer; at the prompt it ends the chat"""


def generate(arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    with _client(arguments) as client:
        _answer(client, text, arguments)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Reads questions until the end of input. A question that fails or whose answer is stopped is forgotten, so that
    the next can be asked. 1: nobody sat there, and one failed."""
    start = [ChatMessage("system", arguments.system)] if arguments.system else []
    said = list(start)
    code = 0
    with _client(arguments) as client:
        while True:
            question = _ask_person()
            if question is None or question == "/quit":
                return code
            if question == "/new":
                said = list(start)
                continue
            if question == "/help":
                print(_HELP)
                continue
            if not question:
                continue
            turn = [*said, ChatMessage("user", question)]
            try:
                answer = _answer(client, turn, arguments)
            except KeyboardInterrupt:
                print("\nbaton: stopped; question and answer are forgotten", file=sys.stderr)
                continue
            except BatonError as error:
                print(f"baton: {_plain(error, arguments)}", file=sys.stderr)
                if isinstance(error, ContextExceeded):
                    print("baton: /new starts over", file=sys.stderr)
                code = 0 if sys.stdin.isatty() else 1
                continue
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
                    f"{worker.free_blocks} of {worker.total_blocks} KV blocks free{_in_use(worker)}"
                )
    return 0 if all(model.ready for model in served) else 1


def _in_use(worker: Worker) -> str:
    """How much of the pool sequences hold; nothing before a worker has told."""
    if not worker.total_blocks:
        return ""
    return f" ({1 - worker.free_blocks / worker.total_blocks:.0%} in use)"


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
    """A client of the router that is named. Its errors say what to do."""
    with _open(arguments) as client:
        try:
            yield client
        except BatonError as error:
            raise _plain(error, arguments) from None


def _plain(error: BatonError, arguments: argparse.Namespace) -> BatonError:
    """The error in the words of the command line, where it has some."""
    if isinstance(error, NoAnswer):
        if arguments.tls_ca:
            return Unavailable(f"No router answers at {_address(arguments)} over TLS: does it speak TLS, by that CA?")
        return Unavailable(
            f"No router answers at {_address(arguments)}: start one with `baton serve`, or give --address."
        )
    if isinstance(error, DeadlineExceeded):
        return DeadlineExceeded(f"The answer was not finished within {arguments.timeout:g} s, see --timeout.")
    return error


def _open(arguments: argparse.Namespace) -> InferenceClient:
    if not arguments.timeout > 0:
        raise ConfigError(f"--timeout is {arguments.timeout:g}, but must be above 0.")
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
    """Raises ConfigError for what no field can hold; the router checks the rest."""
    for name, most in _MOST.items():
        value = getattr(arguments, name)
        if value is not None and not 0 <= value <= most:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, but must be from 0 to {most}.")
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


def _priority(arguments: argparse.Namespace) -> int:
    value = int(arguments.priority)
    if abs(value) > MAX_PRIORITY:
        raise ConfigError(f"--priority is {value}, but must be from -{MAX_PRIORITY} to {MAX_PRIORITY}.")
    return value


def _answer(client: InferenceClient, prompt: Prompt, arguments: argparse.Namespace) -> str:
    """Print the first answer as it comes, and a line's end; give its whole text."""
    text = ""
    messages = client.stream(
        prompt, model=arguments.model, sampling=_sampling(arguments), priority=_priority(arguments)
    )
    try:
        for message in _with_word_of_waiting(messages, client):
            if message.text:
                text += message.text
                _write(message.text)
    except BatonError as error:
        if text:
            _write("\n")
        if text and isinstance(error, NoAnswer):
            raise Unavailable(f"The answer was cut off: the router at {_address(arguments)} went away.") from None
        raise
    _write("\n")
    return text


def _with_word_of_waiting(messages: Iterable[Message], client: InferenceClient) -> Iterator[Message]:
    """The same messages. When none comes for a while, says whether that is for want of workers."""
    timer = threading.Timer(WAITING_S, _tell_of_waiting, [client])
    timer.daemon = True
    timer.start()
    try:
        for message in messages:
            timer.cancel()
            yield message
    finally:
        timer.cancel()


def _tell_of_waiting(client: InferenceClient) -> None:
    try:
        missing = not all(model.ready for model in client.models())
    except (BatonError, ValueError):  # the question itself will tell; ValueError: the channel is closed
        return
    if missing:
        print("baton: waiting for the workers ...", file=sys.stderr)


def _write(text: str) -> None:
    """To standard output, at once. Exits with 1 where it can't take more, as on a full disk."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes
        print(f"baton: The answer can't be written: {error.strerror}.", file=sys.stderr)
        sys.exit(1)


def _ask_person() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
