"""Checkpoints that are served, and those that are refused, with a reason a person can act on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.engine.models import ModelConfig, load_model
from baton.engine.models.config import RopeConfig
from baton.engine.models.rope import inverse_frequencies

CPU = torch.device("cpu")


@pytest.fixture
def own(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that the test may spoil."""
    return Path(shutil.copytree(checkpoint("Llama"), tmp_path / "model"))


def change(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def load(path: Path) -> Any:
    return load_model(path, ModelConfig.from_dir(path), torch.float32, CPU)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": None}, "unknown is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs a factor"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"dtype": "int8"}, "int8"),
    ],
    ids=str,
)
def test_a_configuration_we_cannot_serve_is_refused(own: Path, fields: dict[str, Any], words: str) -> None:
    change(own, **fields)
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_dir(own)


def test_weights_of_another_shape_than_configured_are_refused(own: Path) -> None:
    change(own, intermediate_size=97)
    with pytest.raises(ValueError, match=r"gate_proj.weight has shape \(96, 64\)"):
        load(own)


def test_a_missing_tensor_is_named(own: Path) -> None:
    change(own, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.2"):
        load(own)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused(own: Path, keep: int) -> None:
    file = own / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        ModelConfig.from_dir(own)


def test_a_header_longer_than_the_file_is_refused(own: Path) -> None:
    file = own / "model.safetensors"
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ModelConfig.from_dir(own)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"w": 1},
        {"w": {"dtype": "F32", "shape": [1]}},
        {"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
    ],
    ids=str,
)
def test_a_header_that_is_no_table_of_tensors_is_refused(own: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (own / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match=r"^model\.safetensors: "):
        ModelConfig.from_dir(own)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}], ids=str)
def test_an_index_that_names_no_files_is_refused(own: Path, index: Any) -> None:
    (own / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map"):
        ModelConfig.from_dir(own)


def test_a_directory_with_pickled_weights_alone_is_refused(own: Path) -> None:
    (own / "model.safetensors").rename(own / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors"):
        ModelConfig.from_dir(own)


def test_an_index_may_not_name_files_elsewhere(own: Path) -> None:
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="outside"):
        ModelConfig.from_dir(own)


def test_shards_hold_the_same_model(checkpoint: Callable[..., Path]) -> None:
    sharded = checkpoint("Llama", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, other = load(checkpoint("Llama")), load(sharded)
    assert torch.equal(one.embedding, other.embedding)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(mine.attention.qkv.weight, theirs.attention.qkv.weight)
        assert torch.equal(mine.mlp.gate_up.weight, theirs.mlp.gate_up.weight)


def test_progress_ends_at_every_byte(checkpoint: Callable[..., Path]) -> None:
    path, seen = checkpoint("Llama"), []
    load_model(path, ModelConfig.from_dir(path), torch.float32, CPU, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_the_fingerprint_tells_weights_and_dtypes_apart(own: Path, checkpoint: Callable[..., Path]) -> None:
    before = ModelConfig.from_dir(own)
    assert before.fingerprint == ModelConfig.from_dir(checkpoint("Llama")).fingerprint
    assert before.kv_fingerprint(torch.float32) != before.kv_fingerprint(torch.bfloat16)
    file = own / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the sign of one weight, or so
    file.write_bytes(bytes(data))
    assert ModelConfig.from_dir(own).fingerprint != before.fingerprint


def test_the_old_spelling_of_rope_is_understood(own: Path) -> None:
    scaling = {"type": "linear", "factor": 4.0}
    change(own, rope_parameters=None, rope_theta=50000.0, rope_scaling=scaling)
    rope = ModelConfig.from_dir(own).rope
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 50000.0, 4.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {
            "kind": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        {
            "kind": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 512,
            "attention_factor": 1.3,
            "truncate": False,
        },
        {"kind": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, "theta": 500000.0},
        {"kind": "linear", "factor": 3.0},
    ],
    ids=str,
)
def test_stretched_frequencies_are_those_of_transformers(fields: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = RopeConfig(**fields)
    given = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope.kind == "llama3" else {}
    given |= {name: value for name, value in fields.items() if name not in {"kind", "theta"}}
    parameters = given | {"rope_type": rope.kind, "rope_theta": rope.theta}
    config = LlamaConfig(head_dim=128, rope_parameters=parameters, max_position_embeddings=131072)
    expected, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, CPU)
    found, found_factor = inverse_frequencies(rope, 128)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found_factor == pytest.approx(factor)
