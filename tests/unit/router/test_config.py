import json
from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import ConfigError
from baton.router.config import VARIABLE, RouterConfig

LEAST: dict[str, Any] = {"model_dir": "/m", "model_name": "m", "redis_url": "redis://localhost"}


def read(**fields: Any) -> RouterConfig:
    return RouterConfig.from_json(json.dumps({**LEAST, **fields}))


def test_what_is_written_is_read() -> None:
    config = read(
        api_keys=["a", "b"], grpc_port=0, otlp_endpoint="http://x:4317", drain_s=3, tls_key="k", tls_certificate="c"
    )
    assert config.model_dir == Path("/m")
    assert config.api_keys == ("a", "b")
    assert config.drain_s == 3.0
    assert RouterConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"grpc_prot": 1}, "grpc_prot"),
        ({"grpc_port": "1"}, "grpc_port"),
        ({"grpc_port": True}, "grpc_port"),
        ({"grpc_port": 65536}, "grpc_port"),
        ({"http_port": -1}, "http_port"),
        ({"host": None}, "host"),
        ({"api_keys": "secret-key"}, "api_keys"),
        ({"api_keys": [1]}, "api_keys"),
        ({"tls_key": "k"}, "tls_certificate"),
        ({"model_name": ""}, "model_name"),
        ({"max_running": 0}, "max_running"),
        ({"max_timeout_s": -1.0}, "max_timeout_s"),
        ({"drain_s": -1}, "drain_s"),
        ({"model_dir": 5}, "model_dir"),
    ],
)
def test_a_mistake_is_named_and_no_value_is_shown(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as refusal:
        read(**fields)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}"])
def test_what_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        RouterConfig.from_json(text)


def test_no_secret_is_in_its_text() -> None:
    config = read(redis_url="redis://:secret@h:1/0", cluster_token="secret", api_keys=["secret"])
    assert "secret" not in repr(config)
    assert "secret" in config.to_json()


def test_it_comes_from_the_environment() -> None:
    assert RouterConfig.from_environment({VARIABLE: json.dumps(LEAST)}) == read()
    with pytest.raises(ConfigError, match=VARIABLE):
        RouterConfig.from_environment({})
