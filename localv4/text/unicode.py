"""Well-formed Unicode: repair of lone surrogates, and decoding of UTF-8 that arrives in pieces."""

import codecs


def well_formed(text: str) -> str:
    """Return `text` with each lone surrogate replaced by U+FFFD and each surrogate pair joined.

    JSON may hold such code points; UTF-8 cannot, so neither a tokenizer nor a terminal takes them.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Utf8Decoder:
    """Decode UTF-8 incrementally; the parts join to what `bytes.decode(errors="replace")` gives."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """Return the characters that `data` completes and keep an incomplete rest."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Return U+FFFD for a character that was cut, and start afresh."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
