"""A tiny tokenizer whose tokens are bytes, and a bench to try a relay on."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from baton.router import relay as relay_module
from baton.text.tokenizer import Tokenizer

from .fakes import BYTE_0, EOS, Bench

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({"</s>": EOS} | {letter: BYTE_0 + at for at, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Iterator[Tokenizer]:
    loaded = Tokenizer.from_dir(model_dir)
    yield loaded
    loaded.close()


@pytest.fixture
def bench(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(relay_module, "BACKOFF_S", 0.0)
    return Bench(tokenizer)
