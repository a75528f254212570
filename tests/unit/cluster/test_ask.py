"""What the asking commands say when something goes wrong."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from baton.cluster import ask, cli
from baton.v1 import inference_pb2 as pb

from ..client.scripted_router import Break, ScriptedRouter, message, serving


class Scripted(ScriptedRouter):
    """Waits before each answer; may be without workers."""

    wait_s = 0.0
    ready = True

    def Generate(self, request, context):
        time.sleep(self.wait_s)
        yield from super().Generate(request, context)

    def ListModels(self, request, context):
        return pb.ListModelsResponse(models=[pb.Model(name="m", ready=self.ready)])


@pytest.fixture
def router() -> Scripted:
    return Scripted()


@pytest.fixture
def address(router: Scripted) -> Iterator[str]:
    with serving(router) as at:
        yield at


def run(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("BATON_", "GRPC_"))}
    command = [sys.executable, "-m", "baton.cluster.cli", *arguments]
    streams = {"stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(command, **streams, text=True, env=environment, check=False)


def people_say(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))


def test_a_router_that_goes_away_in_an_answer_has_cut_it_off(
    router: Scripted, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    away = Break(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    router.scripts = [[message(1, "Hel"), away], *[[away] for _ in range(7)]]
    assert cli.main(["generate", "--address", address, "x"]) == cli.EXIT_MISTAKE
    shown = capsys.readouterr()
    assert shown.out == "Hel\n"
    assert shown.err == f"baton: The answer was cut off: the router at {address} went away.\n"


def test_an_answer_that_takes_too_long_is_said_so(
    router: Scripted, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    router.wait_s = 1.0
    router.scripts = [[message(1, last=True)]]
    assert cli.main(["generate", "--address", address, "--timeout", "0.2", "x"]) == cli.EXIT_MISTAKE
    assert capsys.readouterr().err == "baton: The answer was not finished within 0.2 s, see --timeout.\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--timeout", "-1"], "--timeout is -1, but must be above 0."),
        (["--timeout", "nan"], "--timeout is nan, but must be above 0."),
        (["--top-k", "-1"], "--top-k is -1, but must be from 0 to 4294967295."),
        (["--max-tokens", "4294967296"], "--max-tokens is 4294967296, but must be from 0 to 4294967295."),
        (["--priority", "-101"], "--priority is -101, but must be from -100 to 100."),
    ],
)
def test_a_value_out_of_range_names_its_flag(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--address", "127.0.0.1:1", *flags, "x"]) == cli.EXIT_MISTAKE
    assert capsys.readouterr().err == f"baton: {says}\n"


def test_a_priority_goes_to_the_router(router: Scripted, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    router.scripts = [[message(1, "a"), message(1, last=True)] for _ in range(3)]
    assert cli.main(["generate", "--address", address, "--priority", "7", "x"]) == 0
    assert cli.main(["generate", "--address", address, "x"]) == 0
    people_say(["one", "/quit"], monkeypatch)
    assert cli.main(["chat", "--address", address, "--priority", "-3"]) == 0
    assert [request.priority for request in router.asked] == [7, 0, -3]


def test_tls_to_a_router_without_is_one_line(address: str, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    certificate = tmp_path / "ca.pem"
    key = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(tmp_path / "key.pem")]
    make = ["openssl", "req", "-x509", *key, "-subj", "/CN=x", "-days", "1", "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    ended = run("generate", "--address", address, "--tls-ca", str(certificate), "x")
    assert ended.returncode == cli.EXIT_MISTAKE
    assert ended.stderr == f"baton: No router answers at {address} over TLS: does it speak TLS, by that CA?\n"


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    router: Scripted, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    people_say(["one", "two", "/help", "/quit"], monkeypatch)
    router.scripts = [[message(n, "a") for n in range(1, 100)], [message(1, "b"), message(1, last=True)]]
    write = ask._write

    def interrupted_once(text: str) -> None:
        monkeypatch.setattr(ask, "_write", write)
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "_write", interrupted_once)
    assert cli.main(["chat", "--address", address]) == 0
    assert [m.content for m in router.asked[1].chat.messages] == ["two"]
    shown = capsys.readouterr()
    assert "stopped" in shown.err
    assert shown.out.startswith("b\n")
    assert "/new" in shown.out
    assert "Ctrl-C" in shown.out


def test_a_full_context_says_the_way_out(
    router: Scripted, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    people_say(["one", "/quit"], monkeypatch)
    router.scripts = [[Break(grpc.StatusCode.OUT_OF_RANGE, "too long")]]
    assert cli.main(["chat", "--address", address]) == 1, "nobody sits there"
    assert capsys.readouterr().err == "baton: too long\nbaton: /new starts over\n"


def test_want_of_workers_is_said_while_it_waits(
    router: Scripted, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ask, "WAITING_S", 0.1)
    router.wait_s = 1.0
    for router.ready, said in ((True, ""), (False, "baton: waiting for the workers ...\n")):
        router.scripts = [[message(1, "a"), message(1, last=True)]]
        assert cli.main(["generate", "--address", address, "x"]) == 0
        assert capsys.readouterr().err == said


def test_an_output_that_takes_nothing_is_one_line_and_exit_code_one(router: Scripted, address: str) -> None:
    router.scripts = [[message(1, "a"), message(1, last=True)]]
    with open("/dev/full", "w") as full:
        ended = run("generate", "--address", address, "x", stdout=full)
    assert ended.returncode == 1
    assert ended.stderr == "baton: The answer can't be written: No space left on device.\n"
