"""The 256 printable characters that stand for bytes in byte-level BPE files (GPT-2's table)."""


def _byte_characters() -> list[str]:
    """Return the character of each byte; printable Latin-1 stays, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]


CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


def token_to_bytes(token: str) -> bytes:
    """Return the raw bytes of a vocabulary entry; one outside the alphabet is its UTF-8 text."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode("utf-8", "replace")
