import io
from pathlib import Path

import pytest

from baton.cluster import tail
from baton.cluster.tail import Tail


def test_whole_lines_are_shown_once_and_the_rest_when_it_is_whole(tmp_path: Path) -> None:
    shown = io.StringIO()
    copier = Tail(tmp_path, shown)
    log = tmp_path / "a.log"
    log.write_text("one\ntw")
    copier.look()
    assert shown.getvalue() == "one\n"
    with log.open("a") as more:
        more.write("o\n")
    copier.look()
    copier.look()
    assert shown.getvalue() == "one\ntwo\n"


def test_a_line_without_an_end_does_not_hide_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "_MOST_BYTES", 8)
    shown = io.StringIO()
    (tmp_path / "a.log").write_text("x" * 20 + "\nend\n")
    copier = Tail(tmp_path, shown)
    for _ in range(4):
        copier.look()
    assert shown.getvalue() == "x" * 20 + "\nend\n"


def test_what_was_written_before_the_end_is_still_shown(tmp_path: Path) -> None:
    shown = io.StringIO()
    with Tail(tmp_path, shown):
        (tmp_path / "a.log").write_text("last words\n")
    assert shown.getvalue() == "last words\n"
