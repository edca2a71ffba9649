"""Text that means to act on a terminal or to be read without being seen."""

from errors import HIDDEN

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m"
UNSEEN = "\u200b\u200d\u2060\ufeff\U000e0041\U000e007f\u00ad"


def plain(text: str) -> bool:
    return not HIDDEN.search(text.replace("\r", "").replace("\x1b[A", ""))  # which progress bars write
