from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.units import format_size, parse_int, parse_port, parse_size
from baton.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("512MiB", 512 << 20), ("4GiB", 4 << 30), ("4G", 4 << 30), ("1GB", 10**9), ("1.5 kib", 1536), ("7", 7), (7, 7)],
)
def test_a_size_is_read_as_people_write_it(text: object, num_bytes: int) -> None:
    assert parse_size("--kv-memory", text) == num_bytes


@given(st.text(max_size=12))
def test_no_text_makes_a_parser_fail_otherwise_than_with_a_config_error(text: str) -> None:
    for parse in (parse_size, parse_port, lambda name, value: parse_int(name, value, 0)):
        with suppress(ConfigError):
            assert parse("x", text) >= 0


def test_a_size_is_shown_in_the_unit_that_suits_it() -> None:
    assert [format_size(n) for n in (12, 720 << 10, 450 << 20, 90 << 30)] == [
        "12 B",
        "720 KiB",
        "450.0 MiB",
        "90.0 GiB",
    ]
