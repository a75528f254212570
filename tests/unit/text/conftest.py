"""Tiny tokenizers of the two common kinds, made on the spot and saved as a model directory holds them."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from baton.text.tokenizer import Tokenizer

CORPUS = [
    "The router takes a request, places it and streams the answer.",
    "Une réponse à l'été: ça va? Größe, naïve, 東京の天気は晴れです。 Привет, мир! 😀👩‍👩‍👧 🇩🇪",
    "def decode(self, token_ids):\n    return ''.join(self.parts)\n\n\tx = 1.5e-3  # spaces     and tabs\n",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Backend:
    """As GPT-2, Llama 3 and Qwen: every byte is a token or part of one."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def byte_fallback() -> Backend:
    """As Llama 2 and Mistral: words with ▁, and a token per byte for what the vocabulary lacks."""
    bytes_of_fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted(set("▁" + "".join(CORPUS[0] + CORPUS[2])) - set(" \n\t"))
    tokens = [*SPECIAL, *bytes_of_fallback, *letters, "▁▁", "▁t", "he", "▁the", "▁th", "in", "é", "�"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [("▁", "▁"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁t", "h"), ("i", "n")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def save(backend: Backend, path: Path, **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return path


@pytest.fixture(scope="session", params=[byte_level, byte_fallback])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param(), tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level(), tmp_path_factory.mktemp("byte_level_alone"))


@pytest.fixture(scope="session")
def byte_fallback_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_fallback(), tmp_path_factory.mktemp("byte_fallback_alone"))


@pytest.fixture(scope="session")
def byte_level_tokenizer(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(byte_level_dir)


@pytest.fixture(scope="session")
def byte_fallback_tokenizer(byte_fallback_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(byte_fallback_dir)


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    """Once of each kind."""
    return Tokenizer.from_dir(model_dir)
