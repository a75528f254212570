"""Tokens to text, token by token: never half a character, never a text that is taken back later."""

from collections.abc import Sequence

from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
_LONGEST_WINDOW = 16  # tokens; a character has at most four bytes


class IncrementalDetokenizer:
    """Turns the tokens of one answer into text as they come.

    The parts together equal `tokenizer.decode` of all tokens. One exception is deliberate: a tokenizer with byte
    fallback (SentencePiece) decodes a run of byte tokens that is not valid UTF-8 to nothing but replacement characters,
    which would take back characters already sent. Here the valid characters of such a run stay, and each byte that
    belongs to none becomes one replacement character.

    Source of the window: the prefix offset of text-generation-inference's streamed decoding. A token's text depends on
    its left neighbours (word spaces), so it is the difference of two decodings that begin at the same token.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special else frozenset[int]()
        self._window: list[int] = []  # [0, context) sent, for context | [context, end) new
        self._context = 0
        self._sent = 0  # characters of the window's text that were sent
        self._bytes: list[int] = []  # byte tokens that begin a character

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text that is now complete. Ids outside the vocabulary have no text."""
        known = self._tokenizer.is_known
        return "".join([self._push(token) for token in token_ids if token not in self._skipped and known(token)])

    def flush(self) -> str:
        """The answer ended: what is left of a character becomes replacement characters."""
        text = self._flush_bytes()
        if self._window:
            text += self._decode(self._window)[self._sent :]
        self._window, self._context, self._sent = [], 0, 0
        return text

    def _push(self, token: int) -> str:
        if token in self._tokenizer.byte_tokens:
            return self._push_byte(token)
        return self._flush_bytes() + self._push_text(token)

    def _push_text(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        if self._tokenizer.byte_tokens or not text.endswith(REPLACEMENT):  # bytes apart: all else is whole characters
            new, self._sent = text[self._sent :], len(text)
            if new:
                self._drop(self._context)
            elif len(self._window) > _LONGEST_WINDOW:
                self._window.pop()  # a token without text
            return new
        # The last character may be the beginning of one; those before it can't change any more.
        certain = max(self._sent, len(text) - 1)
        new, self._sent = text[self._sent : certain], certain
        if len(self._window) > _LONGEST_WINDOW:
            self._shorten(text)
        return new

    def _drop(self, count: int) -> None:
        """All is sent: forget the first tokens of the window; the rest is the context of what comes."""
        self._window = self._window[count:]
        self._context = len(self._window)
        self._sent = len(self._decode(self._window))

    def _shorten(self, text: str) -> None:
        """Bytes that never become a character: cut the window where both sides decode apart as they do together."""
        for cut in range(len(self._window) - 1, 0, -1):
            left, right = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if right and left + right == text and len(left) <= self._sent:
                self._window = self._window[cut:]
                self._context = 0
                self._sent -= len(left)
                return

    def _push_byte(self, token: int) -> str:
        """A token that stands for one byte: complete characters and broken bytes come out at once."""
        text = ""
        self._bytes.append(token)
        while self._bytes:
            raw = bytes(self._tokenizer.byte_tokens[item] for item in self._bytes)
            try:
                text += self._take_bytes(len(raw), raw.decode())
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                text += self._take_bytes(1, REPLACEMENT)
        return text

    def _flush_bytes(self) -> str:
        return "".join([self._take_bytes(1, REPLACEMENT) for _ in self._bytes[:]])

    def _take_bytes(self, count: int, text: str) -> str:
        taken, self._bytes = self._bytes[:count], self._bytes[count:]
        if not self._window and text != REPLACEMENT:
            text = self._decode(taken)  # the answer's first: a leading space may go
        self._window = taken
        self._context = count
        self._sent = len(self._decode(taken))
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special=False)
