import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from baton.cluster.config import ServeConfig
from baton.cluster.screen import Screen, banner, own_command


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class ClosedTerminal(Terminal):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [("127.0.0.1", False, False), ("::1", False, False), ("0.0.0.0", True, False), ("0.0.0.0", False, True)],
)
def test_who_lets_everybody_in_is_told_so(host: str, keys: bool, warned: bool) -> None:
    assert ("set BATON_API_KEYS" in banner(ServeConfig(host=host), "m", keys=keys)) is warned


def test_the_commands_to_try_go_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.cluster.screen.own_command", lambda: "baton")
    shown = banner(ServeConfig(host="::", grpc_port=7, http_port=8, tls_cert="c.pem", tls_key="k"), "m", keys=True)
    assert "baton chat --address [::1]:7 --tls-ca c.pem" in shown
    assert 'curl -H "Authorization: Bearer $BATON_API_KEY" https://[::1]:8/v1/models' in shown


@pytest.mark.parametrize(
    ("prefill", "decode", "both", "says"),
    [
        (1, 2, 0, "1 prefill worker and 2 decode workers"),
        (0, 0, 1, "1 worker that does both"),
        (0, 0, 2, "2 workers that do both"),
        (2, 1, 1, "2 prefill workers, 1 decode worker and 1 that does both"),
    ],
)
def test_the_banner_says_which_workers_serve(prefill: int, decode: int, both: int, says: str) -> None:
    config = ServeConfig(prefill=prefill, decode=decode, both=both)
    assert f"  Baton serves m: {says}.\n" in banner(config, "m", keys=False)


def test_the_commands_to_try_start_with_one_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / ".venv" / "bin" / "baton"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/another/baton")
    assert own_command() == ".venv/bin/baton"
    monkeypatch.setattr(shutil, "which", lambda name: str(script))
    assert own_command() == "baton"
    monkeypatch.setattr(sys, "argv", ["/x/cluster/cli.py"])
    assert own_command().endswith(" -m baton.cluster.cli")


def test_progress_takes_one_row_and_makes_room_for_other_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    terminal = Terminal()
    screen = Screen(terminal)
    screen.progress("prefill-0 loading 100 %; decode-0 loading 100 %")
    row = terminal.getvalue().removeprefix("\r\x1b[2K")
    assert row == "prefill-0 loadin..."
    with screen.aside():
        terminal.write("a log line\n")
    assert terminal.getvalue().endswith(f"{row}\r\x1b[2Ka log line\n\r\x1b[2K{row}")
    screen.say("Ready.")
    assert terminal.getvalue().endswith(f"{row}\r\x1b[2KReady.\n")


def test_a_closed_terminal_is_no_reason_to_stop() -> None:
    screen = Screen(ClosedTerminal(), as_json=True, notices=ClosedTerminal())
    screen.progress("Starting")
    screen.say("Ready.")
    screen.notice("Ending.")


def test_a_notice_is_json_where_the_logs_are() -> None:
    out, err = io.StringIO(), io.StringIO()
    Screen(out, as_json=True, notices=err).notice("decode-0 ended")
    assert json.loads(err.getvalue())["message"] == "decode-0 ended"
    assert out.getvalue() == ""
    Screen(out, notices=err).notice("decode-0 ended")
    assert out.getvalue() == "decode-0 ended\n"
