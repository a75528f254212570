import json
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.text.generation_config import GenerationDefaults


def write(path: Path, **files: object) -> Path:
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_without_files_the_defaults_are_those_of_the_field(tmp_path: Path) -> None:
    assert GenerationDefaults.from_dir(tmp_path) == GenerationDefaults()


def test_values_of_the_file_are_the_defaults(tmp_path: Path) -> None:
    values = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_new_tokens": 64,
        "eos_token_id": [2, 3],
    }
    defaults = GenerationDefaults.from_dir(write(tmp_path, generation_config=values))
    assert defaults == GenerationDefaults(
        eos_token_ids=frozenset({2, 3}),
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        min_p=0.05,
        repetition_penalty=1.1,
        max_new_tokens=64,
    )


def test_null_means_not_said(tmp_path: Path) -> None:
    values = {"temperature": None, "top_k": None, "eos_token_id": None}
    assert GenerationDefaults.from_dir(write(tmp_path, generation_config=values)) == GenerationDefaults()


def test_config_names_the_ends_where_the_generation_config_does_not(tmp_path: Path) -> None:
    write(tmp_path, generation_config={"temperature": 0.5}, config={"eos_token_id": 7})
    assert GenerationDefaults.from_dir(tmp_path).eos_token_ids == {7}
    write(tmp_path, generation_config={"eos_token_id": 8})
    assert GenerationDefaults.from_dir(tmp_path).eos_token_ids == {8}


def test_do_sample_is_not_looked_at(tmp_path: Path) -> None:
    assert GenerationDefaults.from_dir(write(tmp_path, generation_config={"do_sample": False})).temperature == 1.0


@pytest.mark.parametrize("top_k", [-1, 0])
def test_no_positive_top_k_means_all_tokens(tmp_path: Path, top_k: int) -> None:
    assert GenerationDefaults.from_dir(write(tmp_path, generation_config={"top_k": top_k})).top_k == 0


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"temperature": NaN}',
        {"temperature": "0.5"},
        {"temperature": -1},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": 2.5},
        {"top_k": -2},
        {"max_new_tokens": -1},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [1, -1]},
        {"eos_token_id": [True]},
    ],
)
def test_a_value_out_of_its_range_is_named(tmp_path: Path, content: object) -> None:
    with pytest.raises(ConfigError, match="generation_config"):
        GenerationDefaults.from_dir(write(tmp_path, generation_config=content))
