"""The filter of stop strings against its definition on whole texts."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from localv4.text.stop_strings import StopFilter, held_length

short = st.text("ab\n", max_size=12)


@given(short, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
@settings(deadline=None)
def test_stop_filter_does_not_depend_on_pieces(text: str, stop: list[str], data: Any) -> None:
    ends = sorted((text.find(p) + len(p), text.find(p)) for p in stop if p in text)
    expected = text[: ends[0][1]] if ends else text
    whole = StopFilter(stop)
    assert whole.feed(text) + whole.flush() == expected
    cut = data.draw(st.integers(0, len(text)))
    for pieces in ([text[:cut], text[cut:]], list(text)):
        pieced = StopFilter(stop)
        found = "".join(map(pieced.feed, pieces)) + pieced.flush()
        assert (found, pieced.stopped) == (expected, whole.stopped)


@given(short, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_held_length(text: str, patterns: list[str]) -> None:
    beginnings = {p[:n] for p in patterns for n in range(1, len(p))}
    expected = max(
        (n for n in range(len(text) + 1) if text[len(text) - n :] in beginnings), default=0
    )
    assert held_length(text, patterns) == expected
