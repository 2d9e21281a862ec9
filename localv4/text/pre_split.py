"""How text is cut before byte-pair merging: the known chains of split patterns, by GGUF name.

Only these chains are accepted from a file. A pattern is a program for a backtracking matcher, so a
foreign one could take hours on a short text.
"""

from collections.abc import Mapping, Sequence

_HAN_AND_KANA = "[一-龥぀-ゟ゠-ヿ]+"
_WORDS_AND_SIGNS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_DEEPSEEK_V3 = (r"\p{N}{1,3}", _HAN_AND_KANA, _WORDS_AND_SIGNS)

# `tokenizer.ggml.pre` -> patterns, applied in order, each isolating its matches. The first name of
# a chain is the one to write. `localv4-tiny` is the embedded model's: digits are split singly.
PRE_SPLITS: Mapping[str, tuple[str, ...]] = {
    "joyai-llm": _DEEPSEEK_V3,
    "deepseek-v3": _DEEPSEEK_V3,
    "localv4-tiny": (r"\p{N}", _HAN_AND_KANA, _WORDS_AND_SIGNS),
}


def pre_name(patterns: Sequence[str]) -> str | None:
    """Return the name of a known chain; None for an unknown one.

    Files write line ends in a pattern either as escapes or as the characters themselves.
    """
    escaped = tuple(p.replace("\r", r"\r").replace("\n", r"\n") for p in patterns)
    return next((name for name, chain in PRE_SPLITS.items() if chain == escaped), None)
