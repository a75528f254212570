import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from baton.core.errors import ConfigError
from baton.observe import logs


@pytest.fixture(autouse=True)
def restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_json_line_carries_service_message_and_ids() -> None:
    out = io.StringIO()
    logs.setup("json", "INFO", "baton-router", out)
    with logs.request_context("r-1", "ab" * 16):
        logging.getLogger("baton.x").info("placed on %s", "d-0")
    logging.getLogger("baton.x").debug("not shown")
    entry = json.loads(out.getvalue())
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "INFO",
        "service": "baton-router",
        "logger": "baton.x",
        "message": "placed on d-0",
        "request_id": "r-1",
        "trace_id": "ab" * 16,
    }


def test_outside_a_request_a_line_has_no_ids() -> None:
    out = io.StringIO()
    logs.setup("json", stream=out)
    with logs.request_context("r-1"):
        pass
    logging.getLogger("baton.x").warning("hello")
    assert "request_id" not in json.loads(out.getvalue())


async def test_tasks_started_within_a_request_carry_its_id() -> None:
    out = io.StringIO()
    logs.setup("json", stream=out)

    async def work() -> None:
        logging.getLogger("baton.x").info("at work")

    with logs.request_context("r-1"):
        one = asyncio.create_task(work())
    with logs.request_context("r-2"):
        two = asyncio.create_task(work())
    await asyncio.gather(one, two)
    assert [json.loads(line)["request_id"] for line in out.getvalue().splitlines()] == ["r-1", "r-2"]


@pytest.mark.parametrize("format", logs.FORMATS)
def test_a_request_cannot_forge_a_line(format: str) -> None:
    out = io.StringIO()
    logs.setup(format, stream=out)
    with logs.request_context("r\n2026 ERROR forged"):
        logging.getLogger("baton.x").info("text\n2026 ERROR forged\x1b[31m")
    assert len(out.getvalue().splitlines()) == 1
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("format", logs.FORMATS)
def test_an_exception_is_shown(format: str) -> None:
    out = io.StringIO()
    logs.setup(format, stream=out)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("baton.x").exception("failed")
    assert "ValueError: boom" in out.getvalue()


@pytest.mark.parametrize(("format", "level"), [("xml", "INFO"), ("json", "LOUD")])
def test_unknown_formats_and_levels_are_refused(format: str, level: str) -> None:
    with pytest.raises(ConfigError):
        logs.setup(format, level)
