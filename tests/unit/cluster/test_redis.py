import os
import stat
from pathlib import Path

import pytest
import redis as redis_py

from baton.cluster import redis
from baton.core.errors import ConfigError


def test_a_private_server_answers_on_a_socket_of_ours_alone_and_ends(tmp_path: Path) -> None:
    child, url = redis.start_private(tmp_path)
    try:
        redis.wait_for(child, url)
        with redis_py.Redis.from_url(url) as client:
            assert client.set("a", "b")
            assert client.config_get("port")["port"] == "0"
        assert stat.S_IMODE(os.stat(tmp_path / "redis.sock").st_mode) == 0o600
    finally:
        child.terminate()
        assert child.wait(10)


def test_a_server_that_can_not_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "redis.sock").mkdir()
    child, url = redis.start_private(tmp_path)
    with pytest.raises(ConfigError, match="did not start") as caught:
        redis.wait_for(child, url)
    assert "\n" not in str(caught.value)
    child.wait(10)


def test_no_answer_says_what_to_do_and_never_shows_the_password() -> None:
    with pytest.raises(ConfigError, match="leave it out to get a private one") as caught:
        redis.ping("redis://:secret@127.0.0.1:1/0")
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="'nonsense' can't be used: write redis://"):
        redis.ping("nonsense")
