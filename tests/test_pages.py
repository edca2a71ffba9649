"""Text as pages show it: nothing hidden, nothing cut in silence, and the keys by which tables are sorted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reporting import pages


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\r\n", "\n"),
        ("\r", "␍"),
        ("\x00", "␀"),
        ("\x7f\u200d\ufeff\ud83d", "⟨U+007F⟩⟨U+200D⟩⟨U+FEFF⟩⟨U+D83D⟩"),
        ("é日😀", "é日😀"),
        (None, "None"),
        ("x" * 32, "x" * 32),  # no longer than it would be cut
        ("x" * 50, "xxxxxxxxxx… [40 more characters]"),
    ],
)
def test_visible(text, shown):
    assert pages.visible(text, 10) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_whatever_is_shown_can_be_written_and_hides_nothing(text):
    shown = pages.visible(text)
    shown.encode("utf-8")
    assert not pages.HIDDEN.search(shown) and "\r" not in shown


def test_tokens_and_sizes():
    assert pages.token(" Yes\n") == "␣Yes↵" and pages.token("") == "(empty)"
    sizes = [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1_500_000, "1.5 MB"),
        (65.5e9, "65.5 GB"),
        (2.5e12, "2.5 TB"),
        (4.2e15, "4.2e+03 TB"),
    ]
    assert [pages.size(n) for n, _ in sizes] == [text for _, text in sizes]
    assert pages.rate(500, 2.0) == "250/s" and pages.rate(5, 0) == pages.rate(None, 1) == "-"


def test_sort_keys_are_numbers_or_empty():
    assert [str(pages.sort_key(x)) for x in (None, 3, -2e-9, 0.1)] == [
        ' data-sort=""',
        ' data-sort="3"',
        ' data-sort="-2e-09"',
        ' data-sort="0.1"',
    ]


def test_classes_of_verdicts():
    assert [pages.slug(w) for w in ("reports it", "answers drift towards Yes", "failed: ValueError")] == [
        "reports-it",
        "answers-drift-towards-yes",
        "failed",
    ]
