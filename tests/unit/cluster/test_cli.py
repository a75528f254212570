import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from baton.cluster import cli
from baton.cluster.config import SETTINGS

from ..client.scripted_router import Break, ScriptedRouter, message, serving


@pytest.fixture
def router() -> ScriptedRouter:
    return ScriptedRouter()


@pytest.fixture
def address(router: ScriptedRouter) -> Iterator[str]:
    with serving(router) as at:
        yield at


@pytest.mark.parametrize("command", ["", "serve", "generate", "chat", "status", "models", "plan", "plan memory"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: baton {command}".strip() in capsys.readouterr().out


def test_serve_has_a_flag_for_each_setting_but_the_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert {setting.name for setting in SETTINGS if f"{setting.flag} " not in shown} == {"api_keys", "cluster_token"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--max-token", "3"], "baton serve: unknown flag --max-token: did you mean --max-model-len"),
        (["serve", "--max-bach=3"], "unknown flag --max-bach: did you mean --max-batch"),
        (
            ["generate", "x", "--temprature", "0"],
            "baton generate: unknown flag --temprature: did you mean --temperature?",
        ),
        (["serve", "--frobnicate"], "baton serve: unknown flag --frobnicate. `baton serve --help`"),
        (["status", "x"], "baton status: unknown argument x."),
    ],
)
def test_an_unknown_flag_is_refused_with_what_may_have_been_meant(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == cli.EXIT_MISTAKE
    assert says in (shown := capsys.readouterr().err)
    assert shown.count("\n") == 1


def test_generate_prints_the_answer_and_sends_what_was_asked_for(
    router: ScriptedRouter, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_API_KEY", "k")
    router.scripts = [[message(1, "Hel"), message(2, "lo"), message(2, last=True)]]
    assert cli.main(["generate", "--address", address, "--seed", "7", "--stop", "a", "--stop", "b", "Say"]) == 0
    assert capsys.readouterr().out == "Hello\n"
    asked = router.asked[0]
    assert (asked.text, asked.sampling.seed, list(asked.sampling.stop)) == ("Say", 7, ["a", "b"])
    assert not asked.sampling.HasField("temperature")
    assert router.metadata[0]["authorization"] == "Bearer k"


def test_penalties_are_sent_as_given(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(1, "a"), message(1, last=True)]]
    flags = [
        "--repetition-penalty",
        "1.25",
        "--presence-penalty",
        "-0.5",
        "--frequency-penalty",
        "0",
        "--min-tokens",
        "9",
    ]
    assert cli.main(["generate", "--address", address, *flags, "x"]) == 0
    sent = router.asked[0].sampling
    assert (sent.repetition_penalty, sent.presence_penalty, sent.frequency_penalty) == (1.25, -0.5, 0.0)
    assert (sent.min_tokens, sent.HasField("frequency_penalty")) == (9, True)


def test_a_refusal_is_one_line_and_exit_code_two(
    router: ScriptedRouter, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    router.scripts = [[Break(grpc.StatusCode.OUT_OF_RANGE, "too long")]]
    assert cli.main(["generate", "--address", address, "x"]) == cli.EXIT_MISTAKE
    assert capsys.readouterr().err == "baton: too long\n"


def test_a_conversation_remembers_what_was_said_until_it_is_told_to_forget(
    router: ScriptedRouter, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["one", "two", "/new", "three", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    router.scripts = [[message(1, "a"), message(1, last=True)] for _ in range(3)]
    assert cli.main(["chat", "--address", address, "--system", "s"]) == 0
    said = [[(m.role, m.content) for m in asked.chat.messages] for asked in router.asked]
    assert said[1] == [("system", "s"), ("user", "one"), ("assistant", "a"), ("user", "two")]
    assert said[2] == [("system", "s"), ("user", "three")]


def test_status_and_models_say_what_is_served(
    address: str, router: ScriptedRouter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--address", address]) == 0
    assert cli.main(["models", "--address", address]) == 0
    shown = capsys.readouterr().out
    assert "model    m  ready" in shown
    assert "worker   decode-0  decode: 2 running, 1 waiting, 5 of 8 KV blocks free (38% in use)" in shown
    assert "NAME  CONTEXT" in shown


@pytest.mark.parametrize("command", [["status"], ["models"], ["generate", "x"]])
def test_every_command_says_how_to_start_a_cluster_when_none_is_there(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--address", "127.0.0.1:1"]) == cli.EXIT_MISTAKE
    assert "`baton serve`" in capsys.readouterr().err


def test_a_conversation_outlives_a_router_that_is_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["one", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", "--address", "127.0.0.1:1"]) == 1
    assert "`baton serve`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "/no/such"], "no such directory"),
        (["--decode", "0"], "--decode is 0"),
        (["--redis-url", "redis://127.0.0.1:1/0"], "No Redis answers"),
        (["--config", "/no/such.yaml"], "no configuration file"),
    ],
)
def test_a_mistake_ends_serve_with_one_line_and_code_two_before_anything_starts(
    tmp_path: Path, flags: list[str], says: str
) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
    ports = ["--grpc-port", "59051", "--http-port", "59052", "--metrics-port", "59053"]
    command = [sys.executable, "-m", "baton.cluster.cli", "serve", *ports, *flags]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == cli.EXIT_MISTAKE
    assert says in run.stderr
    assert run.stderr.count("\n") == 1
    assert "Starting" not in run.stdout
