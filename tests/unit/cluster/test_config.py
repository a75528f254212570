from pathlib import Path

import pytest

from baton.cluster.config import SETTINGS, TRANSPORTS, ServeConfig, find_file, load, read_api_keys
from baton.core.errors import ConfigError


def test_flags_go_before_environment_before_file_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("decode: 2\nprefill: 2\nmax-batch: 2\n")
    config = load({"decode": "4", "prefill": None}, {"BATON_DECODE": "3", "BATON_PREFILL": "3"}, file)
    assert (config.decode, config.prefill, config.max_batch, config.block_tokens) == (4, 3, 2, 16)


def test_nothing_given_gives_the_defaults() -> None:
    assert load({}, {}, None) == ServeConfig()


def test_what_may_carry_kv_is_named_as_the_transports_are() -> None:
    from baton.kv_transfer.capability import TRANSPORTS as KNOWN

    assert TRANSPORTS == KNOWN


def test_checksums_are_switched_by_words_or_as_yaml_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("kv_checksums: off\n")
    assert not load({}, {}, file).kv_checksums
    assert load({"kv_checksums": "on"}, {"BATON_KV_CHECKSUMS": "off"}, file).kv_checksums
    assert not load({}, {"BATON_KV_CHECKSUMS": "off"}, None).kv_checksums
    assert load({"deterministic": "on"}, {}, file).deterministic
    assert not load({}, {}, file).deterministic


def test_workers_that_do_both_come_alone_unless_others_are_asked_for_too() -> None:
    def counts(**flags: str) -> tuple[int, int, int]:
        config = load(flags, {}, None)
        return config.prefill, config.decode, config.both

    assert counts() == (1, 1, 0)
    assert counts(both="2") == (0, 0, 2)
    assert counts(both="2", prefill="1", decode="3") == (1, 3, 2)
    assert counts(both="0", decode="2") == (1, 2, 0)
    assert load({}, {"BATON_BOTH": "1"}, None).num_workers == 1


def test_an_empty_file_and_an_empty_variable_say_nothing(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("# nothing yet\nmodel:\n")
    assert load({}, {"BATON_DECODE": ""}, file) == ServeConfig()


@pytest.mark.parametrize(
    ("flags", "environment", "text", "says"),
    [
        ({}, {}, "decod: 2", "Did you mean decode?"),
        ({}, {}, "api_keys: a", "set BATON_API_KEYS instead"),
        ({}, {}, "- a", "must hold lines such as"),
        ({}, {}, "a: [", "can't be read"),
        ({}, {}, "decode: yes", "whole number from 0"),
        ({}, {}, "grpc_port: 1.5", "whole number from 1"),
        ({}, {"BATON_MODELL": "x"}, None, "Did you mean BATON_MODEL?"),
        ({}, {"BATON_GRPC_PORT": "0"}, None, "BATON_GRPC_PORT is 0"),
        ({"decode": "0"}, {}, None, "--decode is 0: neither serves without the other"),
        ({"prefill": "0", "both": "2"}, {"BATON_DECODE": "1"}, None, "neither serves without the other"),
        ({"prefill": "0", "decode": "0"}, {}, None, "--prefill and --decode, or --both"),
        ({"both": "-1"}, {}, None, "whole number from 0"),
        ({"policy": "lifo"}, {}, None, "one of fcfs, sjf, priority, fair, hybrid"),
        ({"step_tokens": "8"}, {}, None, "whole number from 16"),
        ({"swap_memory": "some"}, {}, None, "512MiB"),
        ({"decode": "many"}, {}, None, "--decode is 'many'"),
        ({"kv_memory": "lots"}, {}, None, "512MiB"),
        ({"dtype": "int4"}, {}, None, "auto, bfloat16, float32"),
        ({"tp": "0"}, {}, None, "--tp"),
        ({"transport": "pigeon"}, {}, None, "one of auto, mapped, ray_store"),
        ({"kv_checksums": "maybe"}, {}, None, "one of on, off"),
        ({"block_tokens": "24"}, {}, None, "multiple of 16 from 16 to 256"),
        ({"block_tokens": "7"}, {}, None, "multiple of 16 from 16 to 256"),
        ({}, {"BATON_FROB": "1"}, None, "BATON_FROB. Known are"),
        ({"grpc_port": "8000"}, {}, None, "must differ"),
        ({"tls_cert": "x"}, {}, None, "both --tls-cert and --tls-key"),
        ({"tls_cert": "/no/a", "tls_key": "/no/b"}, {}, None, "is no file"),
        ({"model": "  "}, {}, None, "write a text"),
        ({}, {"BATON_API_KEYS": " , "}, None, "holds no key"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_write(
    tmp_path: Path, flags: dict[str, object], environment: dict[str, str], text: str | None, says: str
) -> None:
    file = None
    if text is not None:
        file = tmp_path / "baton.yaml"
        file.write_text(text)
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")) as caught:
        load(flags, environment, file)
    assert "\n" not in str(caught.value)


def test_redis_url_without_our_prefix_counts_least() -> None:
    assert load({}, {"REDIS_URL": "redis://a"}, None).redis_url == "redis://a"
    assert load({}, {"REDIS_URL": "redis://a", "BATON_REDIS_URL": "redis://b"}, None).redis_url == "redis://b"


def test_variables_of_other_commands_are_no_mistake() -> None:
    load({}, {"BATON_ADDRESS": "x", "BATON_API_KEY": "k", "HOME": "/"}, None)


def test_the_file_here_is_found_and_a_named_one_must_be_there(tmp_path: Path) -> None:
    assert find_file(None, {}, tmp_path) is None
    (tmp_path / "baton.yaml").write_text("")
    assert find_file(None, {}, tmp_path) == tmp_path / "baton.yaml"
    with pytest.raises(ConfigError, match="no configuration file"):
        find_file("/no/such.yaml", {}, tmp_path)
    with pytest.raises(ConfigError, match="no configuration file"):
        find_file(None, {"BATON_CONFIG": "/no/such.yaml"}, tmp_path)


def test_api_keys_come_from_environment_and_file_once_each(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nb\n\nc\n")
    config = load({"api_keys_file": str(file)}, {"BATON_API_KEYS": "a,b"}, None)
    assert read_api_keys(config) == ("a", "b", "c")
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(config)
    file.unlink()
    with pytest.raises(ConfigError, match=r"can't be read: no such file or directory\.$"):
        read_api_keys(config)


def test_no_secret_is_in_its_text() -> None:
    environment = {"BATON_API_KEYS": "secret", "BATON_CLUSTER_TOKEN": "secret", "REDIS_URL": "redis://:secret@h:1"}
    assert "secret" not in repr(load({}, environment, None))


def test_every_setting_has_help() -> None:
    assert all(setting.help for setting in SETTINGS)


def test_the_example_file_of_deploy_is_a_valid_configuration() -> None:
    file = Path(__file__).resolve().parents[3] / "deploy" / "baton.yaml"
    assert load({}, {}, file) != ServeConfig()


def test_prefill_workers_are_like_the_others_where_nothing_else_is_said() -> None:
    config = load({"tp": "2", "block_tokens": "32", "prefill": "3"}, {}, None)
    assert (config.tp_of("prefill"), config.block_tokens_of("prefill"), config.num_ranks) == (2, 32, 8)
    config = load({"prefill_tp": "4", "prefill_block_tokens": "64", "prefill": "3"}, {}, None)
    assert (config.tp_of("prefill"), config.tp_of("decode"), config.num_ranks, config.most_tp) == (4, 1, 13, 4)
    assert (config.block_tokens_of("prefill"), config.block_tokens_of("decode")) == (64, 16)
