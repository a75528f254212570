"""The model's own tokenizer: text to tokens and back, without torch and without transformers.

A tokenizer serves many threads at once. Encoding a long text takes seconds of CPU and releases the interpreter: call
it from a worker thread, never on an event loop.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from ..core.errors import ConfigError, ContextExceeded, InvalidRequest
from .chat_template import ChatTemplate, Message
from .model_files import read_object

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Tokens of one model. Equal to transformers' AutoTokenizer on the same directory, but that a text which brings its
    own begin-of-sequence token gets no second one."""

    def __init__(self, backend: Backend, named_tokens: dict[str, str], chat_template: ChatTemplate | None) -> None:
        """`named_tokens`: "bos_token" and its like, by name."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._chat_template = chat_template
        self.named_tokens = {name: token for name, token in named_tokens.items() if token in vocabulary}
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # one more than the highest id
        self.bos_token_id = vocabulary.get(self.named_tokens.get("bos_token", ""))
        self.eos_token_id = vocabulary.get(self.named_tokens.get("eos_token", ""))
        self.special_token_ids = frozenset(
            [token_id for token_id, token in added.items() if token.special]
            + [vocabulary[token] for token in self.named_tokens.values()]
        )
        decoders = _kinds_of(json.loads(backend.to_str()).get("decoder"))
        self._byte_level = "ByteLevel" in decoders
        self.byte_tokens = _byte_tokens(vocabulary) if "ByteFallback" in decoders else {}
        """What each token of byte fallback stands for; empty for tokenizers of another kind."""
        self.longest_token_bytes = max(
            # The alphabet of byte-level tokens has one character per byte.
            (len(token) if self._byte_level else len(token.encode()) for token in vocabulary),
            default=1,
        )

    @classmethod
    def from_dir(cls, path: Path) -> "Tokenizer":
        """Load tokenizer.json, tokenizer_config.json and the chat template. Raises ConfigError with what is amiss."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{path} has no tokenizer.json: convert the model's tokenizer with transformers first")
        # Which special tokens go around a text is tokenizer.json's to say: like transformers, we ignore add_bos_token.
        older, newer = (read_object(path / name) for name in ("special_tokens_map.json", "tokenizer_config.json"))
        named = named_tokens(older) | named_tokens(newer)
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(f"{file} is not a tokenizer that can be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, named, ChatTemplate.from_dir(path, named))

    def close(self) -> None:
        """End the chat template's process."""
        if self._chat_template is not None:
            self._chat_template.close()

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Tokens of `text`. With `max_tokens`, a text that is surely longer is refused before it costs anything.

        Raises InvalidRequest for text that is no valid Unicode, ContextExceeded as `check_fits` does.
        """
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest("the text is not valid Unicode: it holds a lone surrogate") from error
        if max_tokens is not None:
            self.check_fits(num_bytes, max_tokens)
        # The batch call for one text: it alone skips the offsets, which cost more than the tokens.
        ids = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        bos = self.bos_token_id
        return ids[1:] if add_special_tokens and bos is not None and ids[:2] == [bos, bos] else ids

    def check_fits(self, num_bytes: int, max_tokens: int) -> None:
        """Refuse a text of `num_bytes` that can't have so few tokens. Raises ContextExceeded.

        The bound is the vocabulary's longest token. Tokenizers that drop or replace text could do with fewer tokens;
        they too have to live with it.
        """
        if num_bytes > max_tokens * self.longest_token_bytes:
            raise ContextExceeded(
                f"the prompt has {num_bytes} bytes, at least {-(-num_bytes // self.longest_token_bytes)} tokens; "
                f"at most {max_tokens} fit"
            )

    def encode_chat(self, messages: Sequence[Message], max_tokens: int | None = None) -> list[int]:
        """Tokens of a conversation, up to where the assistant's answer begins.

        The template alone says which special tokens there are, as with transformers' apply_chat_template: none are
        added to its text. And as there (and in vLLM), a special token that a message writes out becomes that token, so
        whoever builds a conversation from others' texts takes such names out of them.
        Raises as `encode` and `ChatTemplate.render` do; InvalidRequest where there is no template.
        """
        if self._chat_template is None:
            raise InvalidRequest("the model has no chat template: send the prompt as text")
        if max_tokens is not None:
            self.check_fits(sum(len(message.content) for message in messages), max_tokens)
        return self.encode(self._chat_template.render(messages), add_special_tokens=False, max_tokens=max_tokens)

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the tokens. Ids outside the vocabulary have none."""
        kept = [token for token in token_ids if token not in self.special_token_ids] if skip_special else token_ids
        return self._backend.decode(list(kept), skip_special_tokens=skip_special)

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8 of one token, special ones too: also of a part of a character, for which no text stands."""
        if token_id in self.byte_tokens:
            return bytes([self.byte_tokens[token_id]])
        token = self._backend.id_to_token(token_id) or ""
        if self._byte_level and token_id not in self.special_token_ids and all(c in _BYTE_OF for c in token):
            return bytes(_BYTE_OF[c] for c in token)
        return self.decode((token_id,), skip_special=False).encode()

    def is_known(self, token_id: int) -> bool:
        return self._backend.id_to_token(token_id) is not None


def named_tokens(config: dict[str, object]) -> dict[str, str]:
    """Special tokens by name ("bos_token" ...), each written as text or as an object with `content`."""
    found = {}
    for name in _NAMED:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[name] = content
    return found


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level tokens (GPT-2, encoder.py): printable Latin-1 for itself,
    the other bytes, in order, from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _kinds_of(decoder: object) -> set[str]:
    """Types in a decoder of tokenizer.json, those inside a sequence too."""
    if not isinstance(decoder, dict):
        return set()
    inner = decoder.get("decoders") or []
    return {str(decoder.get("type"))}.union(*(_kinds_of(item) for item in inner))


def _byte_tokens(vocabulary: dict[str, int]) -> dict[int, int]:
    matches = ((token_id, _BYTE_TOKEN.fullmatch(token)) for token, token_id in vocabulary.items())
    return {token_id: int(match[1], 16) for token_id, match in matches if match}
