"""The command `baton`. Only parsing happens here, so that help answers at once; each command imports what it needs."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..core.errors import BatonError
from .config import DEFAULT_ADDRESS, SETTINGS, close_names, find_file, load
from .memory_plan import GPUS

EXIT_MISTAKE = 2  # the person mends something; the message says what

_DESCRIPTION = """\
Serves large language models with prefill and decode on different workers.

start here:
  baton serve                          start a cluster on this machine, with the small bundled model
  baton generate "A list in Python"    ask it, from another terminal
"""
_SERVE = """\
Starts a whole cluster on this machine: Redis, Ray, a router, prefill and decode workers, or workers that do both.
Ctrl-C ends it and leaves nothing behind.
Settings: flags > environment (BATON_MODEL, BATON_KV_MEMORY, ...) > baton.yaml > defaults.

examples:
  baton serve
  baton serve --model Qwen/Qwen3-0.6B --kv-memory 2GiB --max-model-len 4096
  baton serve --model ./my-llama --prefill 2 --decode 2 --max-model-len 4096
  baton serve --both 1 --policy fair
"""
_GENERATE = """\
Continues a text and prints the answer as it comes. Reads standard input when the text is "-".

examples:
  baton generate "A dictionary maps"
  baton generate --max-tokens 64 --temperature 0 "The with statement"
  cat question.txt | baton generate -
"""
_CHAT = """\
A conversation in the terminal, by the model's own chat template. Ctrl-D or /quit ends it; /new forgets what was said.

examples:
  baton chat
  baton chat --system "Answer in one sentence." --temperature 0.7
"""
_PLAN = """\
Answers what a model would need, before anything is bought, downloaded or started.

examples:
  baton plan memory ./my-llama
"""
_PLAN_MEMORY = """\
Counts weights and KV cache of a model from its config.json, and how many sequences fit on which GPU, line by line.
Neither weights nor a GPU are needed; where weights are there, their files say how many they are. 0 sequences is an
answer, too: the exit status says only whether it could be worked out.

examples:
  baton plan memory ./Llama-3.1-8B --context 8192
  baton plan memory ./Llama-3.1-70B/config.json --gpu h200 --tp 4 --kv-dtype fp8
  baton plan memory ./Qwen3-0.6B --memory 12GiB --max-model-len 4096
"""


class _Parser(argparse.ArgumentParser):
    """Refuses an unknown flag itself, by the name of its command and with what may have been meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, left = super().parse_known_args(args, namespace)
        if left:
            self._refuse(left[0].partition("=")[0])
        return found, left

    def _refuse(self, word: str) -> NoReturn:
        kind = "flag" if word.startswith("-") else "argument"
        close = close_names(word, self._option_string_actions) if kind == "flag" else []
        meant = f": did you mean {' or '.join(close)}?" if close else "."
        self.exit(EXIT_MISTAKE, f"{self.prog}: unknown {kind} {word}{meant} `{self.prog} --help` lists all.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0: done; 2: something to mend, said in one line; 130: interrupted."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except BatonError as error:
        print(f"baton: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="baton", description=_DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"baton {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=description, formatter_class=raw, allow_abbrev=False)

    serve = command("serve", "start a cluster on this machine", _SERVE)
    serve.add_argument("--config", metavar="FILE", help="settings as YAML (default: baton.yaml here, if there is one)")
    for setting in SETTINGS:
        if not setting.secret:
            serve.add_argument(setting.flag, metavar=setting.metavar, help=setting.help)
    serve.set_defaults(run=_serve)

    generate = command("generate", "continue a text", _GENERATE)
    generate.add_argument("text", help='the text to continue; "-": from standard input')
    _add_sampling(generate)
    generate.set_defaults(run=_generate)

    chat = command("chat", "talk with the model", _CHAT)
    chat.add_argument("--system", metavar="TEXT", help="instruction that stands before the conversation")
    _add_sampling(chat)
    chat.set_defaults(run=_chat)

    status = command("status", "say whether a cluster is there and what it serves", "Asks the router how it is.")
    _add_address(status)
    status.set_defaults(run=_status)

    models = command("models", "list the models that are served", "Lists the models that the router serves.")
    _add_address(models)
    models.set_defaults(run=_models)

    plan = command("plan", "work out what a model needs", _PLAN)
    questions = plan.add_subparsers(title="questions", metavar="QUESTION", required=True)
    memory = questions.add_parser(
        "memory",
        help="how much memory, and how many sequences fit",
        description=_PLAN_MEMORY,
        formatter_class=raw,
        allow_abbrev=False,
    )
    _add_memory(memory)
    memory.set_defaults(run=_plan_memory)
    return parser


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """Texts: what they stand for is checked by the command, as settings are."""
    parser.add_argument("model", metavar="MODEL", help="directory with a config.json, or that file itself")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpu", metavar="GPU", help=f"one of {', '.join(GPUS)} (default: a table of all)")
    where.add_argument("--memory", metavar="SIZE", help="memory of each GPU instead, as CUDA counts it, e.g. 80GiB")
    parser.add_argument("--tp", metavar="N", help="tensor-parallel ranks, a GPU each (default: 1)")
    parser.add_argument("--dtype", metavar="DTYPE", help="of the weights: auto (the model's), bfloat16 or float32")
    parser.add_argument(
        "--kv-dtype", metavar="DTYPE", help="of the KV cache: auto (as weights), bfloat16, float32, fp8"
    )
    parser.add_argument(
        "--max-model-len", metavar="N", help="tokens a sequence may have (default: what the model allows)"
    )
    parser.add_argument("--context", metavar="TOKENS", help="tokens each sequence does have (default: the most)")
    parser.add_argument("--block-tokens", metavar="N", help="tokens of one KV block, a multiple of 16 (default: 16)")


def _add_address(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where", "An API key is read from BATON_API_KEY.")
    group.add_argument(
        "--address", metavar="HOST:PORT", help=f"gRPC address of the router (BATON_ADDRESS; default: {DEFAULT_ADDRESS})"
    )
    group.add_argument("--tls-ca", metavar="FILE", help="speak TLS and trust this PEM certificate")
    group.add_argument("--timeout", metavar="S", type=float, default=600.0, help="seconds to wait (default: 600)")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "What is not given takes the model's own default.")
    group.add_argument("--model", metavar="NAME", default="", help="which model (default: the one served)")
    group.add_argument("--max-tokens", metavar="N", type=int, help="how long the answer may become")
    group.add_argument("--min-tokens", metavar="N", type=int, help="no end of sequence before so many")
    group.add_argument("--temperature", metavar="T", type=float, help="0 always takes the likeliest token")
    group.add_argument("--top-p", metavar="P", type=float, help="only the likeliest tokens that hold this share")
    group.add_argument("--top-k", metavar="K", type=int, help="only the K likeliest tokens; 0: all")
    group.add_argument("--min-p", metavar="P", type=float, help="only tokens at least this share as likely as the best")
    group.add_argument("--repetition-penalty", metavar="R", type=float, help="above 1: less of what was said or asked")
    group.add_argument("--presence-penalty", metavar="P", type=float, help="above 0: less of what was said")
    group.add_argument("--frequency-penalty", metavar="P", type=float, help="the same, for each time it was said")
    group.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same answer")
    group.add_argument(
        "--priority",
        metavar="N",
        type=int,
        default=0,
        help="larger goes first, where the policy looks at it",
    )
    group.add_argument("--stop", metavar="TEXT", action="append", help="end the answer before this text; may repeat")
    _add_address(parser)


def _serve(arguments: argparse.Namespace) -> int:
    flags = {setting.name: getattr(arguments, setting.name) for setting in SETTINGS if not setting.secret}
    file = find_file(arguments.config, os.environ, Path.cwd())
    config = load(flags, os.environ, file)
    from .launch import serve  # noqa: PLC0415  # heavy: Ray

    try:
        return serve(config)
    except BatonError as error:
        if config.log_format != "json":
            raise
        from .screen import json_line  # noqa: PLC0415

        print(json_line("ERROR", str(error)), file=sys.stderr)
        return EXIT_MISTAKE


def _generate(arguments: argparse.Namespace) -> int:
    from . import ask  # noqa: PLC0415  # gRPC

    return ask.generate(arguments)


def _chat(arguments: argparse.Namespace) -> int:
    from . import ask  # noqa: PLC0415

    return ask.chat(arguments)


def _status(arguments: argparse.Namespace) -> int:
    from . import ask  # noqa: PLC0415

    return ask.status(arguments)


def _models(arguments: argparse.Namespace) -> int:
    from . import ask  # noqa: PLC0415

    return ask.models(arguments)


def _plan_memory(arguments: argparse.Namespace) -> int:
    from . import memory_report  # noqa: PLC0415

    return memory_report.run(arguments)


def _version() -> str:
    from .. import __version__  # noqa: PLC0415

    return __version__


if __name__ == "__main__":
    sys.exit(main())
