import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from baton.cluster import preflight
from baton.cluster.config import ServeConfig
from baton.cluster.plan import count_gpus, gpu_share
from baton.cluster.preflight import ModelSize
from baton.core.errors import ConfigError

SIZE = ModelSize(max_position_embeddings=4096, dtype="bfloat16", rank_weight_bytes=12 << 20, kv_bytes_per_token=4096)
LLAMA = {
    "num_attention_heads": 8,
    "hidden_size": 512,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}


def write_model(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    return folder


def test_a_model_is_measured_from_its_files(tmp_path: Path) -> None:
    write_model(tmp_path)
    size = preflight.measure_model(tmp_path, "auto")
    assert (size.dtype, size.weight_bytes, size.kv_bytes_per_token) == ("bfloat16", 1000, 4 * 2 * 2 * 64 * 2)
    assert preflight.measure_model(tmp_path, "float32").weight_bytes == 2000
    write_model(tmp_path, torch_dtype="float16", head_dim=32)
    size = preflight.measure_model(tmp_path, "auto")
    assert (size.dtype, size.kv_bytes_per_token) == ("bfloat16", 4 * 2 * 2 * 32 * 2)


def test_ranks_share_the_weights_and_repeat_what_does_not_split(tmp_path: Path) -> None:
    parts = {"architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "intermediate_size": 2048}
    write_model(tmp_path, **parts)
    (tmp_path / "model.safetensors").write_bytes(b"0" * 10_000_000)
    one, two, four, eight = (preflight.measure_model(tmp_path, "auto", tp) for tp in (1, 2, 4, 8))
    assert one.weight_bytes == 10_000_000
    assert 5_000_000 < two.rank_weight_bytes < 5_010_000  # the norms are on both
    assert two.weight_bytes == 2 * two.rank_weight_bytes
    assert one.kv_bytes_per_token == two.kv_bytes_per_token
    assert four.kv_bytes_per_token == 2 * one.kv_bytes_per_token  # of two KV heads each is on two ranks
    assert four.rank_weight_bytes > two.rank_weight_bytes / 2
    assert eight.kv_bytes_per_token == 4 * one.kv_bytes_per_token
    with pytest.raises(ConfigError, match="--tp is 3: 8 heads do not split evenly over 3 ranks"):
        preflight.measure_model(tmp_path, "auto", 3)


def test_each_rank_more_costs_its_process() -> None:
    free = 3 << 30
    assert preflight.settle_kv_bytes(ServeConfig(tp=2), SIZE, 4096, free) < preflight.settle_kv_bytes(
        ServeConfig(), SIZE, 4096, free
    )
    with pytest.raises(ConfigError, match=r"2 workers x .* 1\.3 GiB\) \+ "):
        preflight.settle_kv_bytes(ServeConfig(tp=4), SIZE, 4096, 1 << 30)


def test_ranks_of_a_worker_do_not_share_a_gpu() -> None:
    for tp, gpus in [(1, 1), (2, 4), (2, 8), (2, 0)]:  # 0: on the CPU
        preflight.check_gpus(ServeConfig(tp=tp), gpus)
    with pytest.raises(ConfigError, match=r"--tp is 2: the 4 ranks of 2 workers need 4 GPUs, .* are 2: .*--both 1"):
        preflight.check_gpus(ServeConfig(tp=2), 2)
    with pytest.raises(ConfigError, match=r"--prefill-tp is 2: the 3 ranks .* are 2: lower --prefill-tp"):
        preflight.check_gpus(ServeConfig(prefill_tp=2), 2)
    preflight.check_gpus(ServeConfig(tp=2, prefill=0, decode=0, both=1), 2)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num_attention_heads": "x"}'])
def test_a_config_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="is not that of") as caught:
        preflight.measure_model(tmp_path, "auto")
    assert "\n" not in str(caught.value)


def test_a_taken_port_is_told_before_anything_starts() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} is taken.*--http-port"):
            preflight.check_ports(ServeConfig(grpc_port=free_port(), http_port=port, metrics_port=free_port()))


def test_all_taken_ports_are_told_at_once_with_flags_that_work() -> None:
    with socket.socket() as one, socket.socket() as other:
        for listener in (one, other):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        grpc, http = one.getsockname()[1], other.getsockname()[1]
        config = ServeConfig(grpc_port=grpc, http_port=http, metrics_port=free_port())
        with pytest.raises(ConfigError, match=f"Ports {grpc} and {http} are taken") as caught:
            preflight.check_ports(config)
        words = str(caught.value).split(" add ")[1].split()
        given = zip(words[::2], words[1::2], strict=True)
        flags = {name.removeprefix("--").replace("-", "_"): int(port) for name, port in given}
        assert flags["metrics_port"] == config.metrics_port
        preflight.check_ports(replace(ServeConfig(), **flags))


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(ConfigError, match="no address of this machine"):
        preflight.check_ports(ServeConfig(host="203.0.113.1", grpc_port=free_port()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_context_is_the_models_unless_less_is_asked_for() -> None:
    assert preflight.settle_context(ServeConfig(), SIZE) == 4096
    assert preflight.settle_context(ServeConfig(max_model_len=100), SIZE) == 100
    with pytest.raises(ConfigError, match="at most 4096"):
        preflight.settle_context(ServeConfig(max_model_len=5000), SIZE)


def test_kv_memory_is_a_share_of_what_is_free_and_holds_a_request() -> None:
    assert preflight.settle_kv_bytes(ServeConfig(), SIZE, 4096, 24 << 30) == 1 << 30
    small = preflight.settle_kv_bytes(ServeConfig(), SIZE, 4096, 4 << 30)
    assert 4096 * 4096 <= small < 1 << 30
    assert preflight.settle_kv_bytes(ServeConfig(kv_memory=99 << 20), SIZE, 4096, 24 << 30) == 99 << 20


def test_too_little_memory_is_told_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"2 workers x .* = 1\.9 GiB, free are 1\.0 GiB"):
        preflight.settle_kv_bytes(ServeConfig(), SIZE, 4096, 1 << 30)
    with pytest.raises(ConfigError, match=r"holds no request of 4096 tokens, which takes 16\.0 MiB"):
        preflight.settle_kv_bytes(ServeConfig(kv_memory=1 << 20), SIZE, 4096, 24 << 30)


def test_swap_memory_is_host_memory_and_stands_in_the_arithmetic() -> None:
    config = ServeConfig(prefill=1, decode=2, swap_memory=8 << 30)
    says = r"3 workers x .* \+ 2 x 8\.0 GiB swap \+ .* = 1[89]\.. GiB, free are 12\.0 GiB: .*--swap-memory"
    with pytest.raises(ConfigError, match=says) as caught:
        preflight.settle_kv_bytes(config, SIZE, 4096, 12 << 30)
    assert "\n" not in str(caught.value)
    beside = preflight.settle_kv_bytes(config, SIZE, 4096, 20 << 30)
    assert beside < preflight.settle_kv_bytes(replace(config, swap_memory=None), SIZE, 4096, 20 << 30)


def test_swap_memory_by_default_is_a_tenth_of_what_is_left_and_never_makes_a_start_fail() -> None:
    config = ServeConfig(decode=2)
    kv = preflight.settle_kv_bytes(config, SIZE, 4096, 20 << 30)
    swap = preflight.settle_swap_bytes(config, SIZE, kv, 20 << 30)
    assert 0 < 2 * swap < (20 << 30) // 10
    assert preflight.settle_swap_bytes(config, SIZE, kv, 1 << 30) == 0
    assert preflight.settle_swap_bytes(replace(config, swap_memory=0), SIZE, kv, 20 << 30) == 0
    assert preflight.settle_swap_bytes(replace(config, swap_memory=5 << 30), SIZE, kv, 20 << 30) == 5 << 30


def test_gpus_are_counted_without_torch(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    assert count_gpus("auto", {}, tmp_path) == 2
    assert count_gpus("auto", {"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert count_gpus("auto", {"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert count_gpus("cpu", {}, tmp_path) == 0
    none = tmp_path / "none"
    assert count_gpus("auto", {}, none, none) == 0
    with pytest.raises(ConfigError, match="no GPU is here"):
        count_gpus("cuda", {}, none, none)


def test_gpus_are_counted_by_their_device_nodes_where_the_driver_shows_no_folder(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia11", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert count_gpus("auto", {}, tmp_path / "none", tmp_path) == 2
    assert count_gpus("cuda", {"CUDA_VISIBLE_DEVICES": "11"}, tmp_path / "none", tmp_path) == 1


@pytest.mark.parametrize(("gpus", "workers", "share"), [(0, 2, 0), (1, 2, 0.5), (2, 2, 1), (8, 2, 1), (2, 3, 0.5)])
def test_workers_share_the_gpus_so_that_all_fit(gpus: int, workers: int, share: float) -> None:
    assert gpu_share(gpus, workers) == share
