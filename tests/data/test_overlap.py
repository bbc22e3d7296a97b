"""The 13-word cut against plain sets."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_btx.data.overlap import HeldOutRuns
from tests.data.oracle import shared

WORDS = st.sampled_from(["a", "b.", "B", "c,d", "e", "\u00e9", "(f", "--", "0"])
LINES = st.lists(WORDS, min_size=1, max_size=20).map(" ".join)
TEXTS = st.lists(LINES, min_size=1, max_size=30).map("\n".join)


@settings(max_examples=200)
@given(st.lists(TEXTS, min_size=1, max_size=4), TEXTS)
def test_what_is_left_shares_nothing(held_out: list[str], text: str) -> None:
    pieces = list(HeldOutRuns(held_out).clean(text))
    assert shared(pieces, held_out) == set()
    if not shared([text], held_out):
        assert pieces == [text]
    kept = "".join(pieces).splitlines()
    lines = iter(text.splitlines())
    assert all(line in lines for line in kept)  # whole lines, in their order


@settings(max_examples=100)
@given(TEXTS)
def test_a_document_shares_all_of_itself(text: str) -> None:
    held_out = HeldOutRuns([text])
    long = shared([text], [text]) != set()
    assert held_out.shares(text) is long


def test_only_the_shared_lines_go() -> None:
    common = "one two three four five six seven eight nine ten eleven twelve thirteen\n"
    own = "".join(f"this is line {i} which nobody else has {i * i}\n" for i in range(20))
    other = own.replace("line", "row")
    pieces = list(HeldOutRuns([f"before {common} after"]).clean(own + common + other))
    assert pieces == [own, other]


def test_twelve_words_may_be_shared() -> None:
    common = "one two three four five six seven eight nine ten eleven twelve"
    held_out = HeldOutRuns([f"here {common} there"])
    assert not held_out.shares(f"this {common} that")
    assert held_out.shares(f"here {common} that")
    assert held_out.shares(f"HERE {common} that")
    assert held_out.shares(f"here, {common.replace(' ', ', ')} that")


def test_letters_that_change_length_in_lower_case() -> None:
    common = "one two three four five six seven eight nine ten eleven twelve thirteen"
    text = "\u0130 " * 300 + "\n" + common + "\n" + "word " * 100
    assert not shared(HeldOutRuns([common]).clean(text), [common])


def test_nothing_held_out() -> None:
    assert list(HeldOutRuns([]).clean("some text")) == ["some text"]
