"""Stop strings over streamed text."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string in text that arrives in parts, however it is cut.

    The match that is complete first wins; of those that are complete at the same character, the one that begins first,
    then the one named first. So the answer depends on the text alone, and no text waits longer than it must: what is
    held back is the longest suffix that begins a stop string without being one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._longest_hold = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        return self._matched

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next part. Returns the text now certain to stand before any match, and the stop string if one is
        complete; nothing comes out after that."""
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        match = self._find(text)
        if match is not None:
            start, self._matched = match
            self._held = ""
            return text[:start], self._matched
        certain = self._certain_length(text)
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """The text ended: what was held back was no stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str] | None:
        """Start and stop string of the match that ends first."""
        best: tuple[int, int] | None = None
        found = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
                found = (start, stop)
        return found

    def _certain_length(self, text: str) -> int:
        for start in range(max(0, len(text) - self._longest_hold), len(text)):
            if text[start] in self._first_characters and any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
