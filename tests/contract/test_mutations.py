"""What arrives otherwise than it was sent is refused; see kv_mutations.py, which runs any number."""

from collections import Counter

from ..kv_mutations import CHANGES, run


def test_no_changed_piece_lands_and_what_comes_twice_does_no_harm() -> None:
    rounds = 12
    found = Counter(what.split(":")[0] for what in run(2 * rounds * len(CHANGES)).elements())
    assert found == {change.__name__: 2 * rounds for change in CHANGES}
