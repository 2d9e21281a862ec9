"""Stand-ins for control tokens in the text of a completion.

A lone surrogate never comes out of decoding UTF-8. So a completion in which each control token is
one surrogate keeps tokens and text that merely spells them apart, and is still one string.
"""

import re

from localv4.text.special_tokens import DSML, END_THINK, THINK
from localv4.text.unicode import well_formed

DSML_MARK = "\udc01"
THINK_MARK = "\udc02"
END_THINK_MARK = "\udc03"

MARKS = {DSML: DSML_MARK, THINK: THINK_MARK, END_THINK: END_THINK_MARK}
_NAMES = str.maketrans({mark: name for name, mark in MARKS.items()})
_NOTHING = str.maketrans(dict.fromkeys(MARKS.values()))
_ANY_NAME = re.compile("|".join(map(re.escape, MARKS)))


def marked(text: str) -> str:
    """Return text in which every spelled token counts as the token."""
    return _ANY_NAME.sub(lambda match: MARKS[match.group()], well_formed(text))


def spelled(text: str) -> str:
    """Return text with each mark written as the name of its token."""
    return text.translate(_NAMES)


def unmarked(text: str) -> str:
    """Return text without marks."""
    return text.translate(_NOTHING)
