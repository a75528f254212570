"""Checkpoints that are served, and those that are refused, with a reason a person can act on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.engine.loading import load_part
from baton.engine.models import ModelConfig, load_model

CPU = torch.device("cpu")
EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
}


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
        ({"rope_parameters": {"rope_type": "proportional"}}, "proportional"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor must be a list of 8"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": ["1"] * 8}}, "short_factor must be a list of 8"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor must be a list of 8"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "needs a factor"),
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


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("Mixtral", {"num_local_experts": 0}, "num_local_experts must be"),
        ("Mixtral", {"num_local_experts": 9}, r"gate\.weight has shape \(4, 64\), config.json says \(9, 64\)"),
        ("Mixtral", {"num_experts_per_tok": 5}, "5 experts for each token, of 4"),
        ("Mixtral", {"hidden_act": "gelu"}, "gelu"),
        ("Mixtral", {"quantization_config": {"bits": 4}}, "quantised"),
        ("Qwen3Moe", {"moe_intermediate_size": None}, "moe_intermediate_size"),
        ("Qwen3Moe", {"moe_intermediate_size": 41}, r"experts\.0\.gate_proj\.weight has shape \(40, 64\)"),
        ("Qwen3Moe", {"mlp_only_layers": [0]}, "no tensor model.layers.0.mlp.gate_proj"),
        ("Qwen3Moe", {"mlp_only_layers": 1}, "must be a list"),
        ("Qwen3Moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("Qwen3Moe", {"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM is not supported"),
    ],
    ids=str,
)
def test_experts_we_cannot_serve_are_refused(
    family: str, fields: dict[str, Any], words: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    own = Path(shutil.copytree(checkpoint(family, **EXPERTS[family]), tmp_path / "model"))
    change(own, **fields)
    with pytest.raises(ValueError, match=words):
        load(own)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_are_the_same_whatever_config_json_leaves_out(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import transformers

    own = tmp_path / "model"
    shutil.copytree(checkpoint(family, **EXPERTS[family]), own)
    raw = json.loads((own / "config.json").read_text())
    changed: dict[str, Any] = {"num_attention_heads": 16}
    if family == "Qwen3Moe":
        changed |= {"num_experts": raw["num_local_experts"], "norm_topk_prob": True}
    else:
        del raw["num_experts_per_tok"]
    for name in ("num_key_value_heads", "num_local_experts", "rms_norm_eps", "rope_parameters"):
        del raw[name]
    (own / "config.json").write_text(json.dumps(raw | changed))
    found, meant = ModelConfig.from_dir(own), transformers.AutoConfig.from_pretrained(own)
    assert found.experts is not None
    assert (found.experts.count, found.experts.per_token) == (meant.num_local_experts, meant.num_experts_per_tok)
    assert found.experts.normalise == (family == "Mixtral" or meant.norm_topk_prob)
    assert (found.num_kv_heads, found.rms_norm_eps) == (meant.num_key_value_heads, meant.rms_norm_eps)
    assert found.rope.theta == meant.rope_parameters["rope_theta"]


def test_an_original_length_beside_the_rope_parameters_counts_more(own: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    change(own, rope_parameters=None, rope_scaling=scaling, original_max_position_embeddings=256)
    rope = ModelConfig.from_dir(own).rope
    assert (rope.original_max_position_embeddings, rope.factor) == (256, 4.0)
    with pytest.raises(ValueError, match="up to 256 positions, not 1024"):
        load(own)


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
    assert torch.equal(one.embedding.weight, other.embedding.weight)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(mine.attention.qkv.weight, theirs.attention.qkv.weight)
        assert torch.equal(mine.mlp.gate_up.weight, theirs.mlp.gate_up.weight)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_shards_hold_the_same_experts(family: str, checkpoint: Callable[..., Path]) -> None:
    sharded = checkpoint(family, max_shard_size="40KB", **EXPERTS[family])
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, other = load(checkpoint(family, **EXPERTS[family])), load(sharded)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for name in ("gate_up", "down"):
            assert torch.equal(getattr(mine.mlp, name), getattr(theirs.mlp, name))
        assert torch.equal(mine.mlp.router.weight, theirs.mlp.router.weight)


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


def test_workers_that_keep_kv_in_different_dtypes_say_that_they_have_one_model(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("Llama")
    dtypes = (torch.float32, torch.bfloat16)
    one, other = (load_part(path, dtype, CPU, kv_bytes=1 << 20).kv_cache.geometry for dtype in dtypes)
    assert one.model == other.model == ModelConfig.from_dir(path).fingerprint
    assert one.fingerprint != other.fingerprint  # the same block has another key in another dtype


def test_the_old_spelling_of_rope_is_understood(own: Path) -> None:
    scaling = {"type": "linear", "factor": 4.0}
    change(own, rope_parameters=None, rope_theta=50000.0, rope_scaling=scaling)
    rope = ModelConfig.from_dir(own).rope
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 50000.0, 4.0)
