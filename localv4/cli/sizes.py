"""Sizes and speeds as people write them: `48GiB`, `512M`, `7GB/s`, plain bytes."""

import re

from localv4.errors import UsageError

_UNITS = {
    "": 1,
    **{unit: 1024**power for power, unit in enumerate(("k", "m", "g", "t"), 1)},
    **{f"{unit}ib": 1024**power for power, unit in enumerate(("k", "m", "g", "t"), 1)},
    **{f"{unit}b": 1000**power for power, unit in enumerate(("k", "m", "g", "t"), 1)},
    "b": 1,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
MOST_BYTES = 1 << 60
BITS = 8  # of a byte


def parse_bytes(text: str, option: str) -> int:
    """Return a number of bytes: 8GiB and 8G are 8 * 2^30, 8GB is 8 * 10^9, 8000 is 8000.

    Raises UsageError naming the option.
    """
    found = _SIZE.fullmatch(text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise UsageError(f"{option} is {text!r}, expected a size such as 48GiB, 512MiB or 8GB")
    nbytes = int(float(found[1]) * unit)
    if not 0 < nbytes <= MOST_BYTES:
        raise UsageError(f"{option} is {text}, expected more than 0 and at most {MOST_BYTES} bytes")
    return nbytes


def parse_rate(text: str, option: str) -> float:
    """Return bytes per second: 90GB/s, of networks 100Mbit/s; the `/s` may be left out.

    Raises UsageError naming the option.
    """
    amount = text.strip().removesuffix("/s")
    try:
        if amount.lower().endswith("bit"):
            return parse_bytes(f"{amount[:-3]}B", option) / BITS
        return float(parse_bytes(amount, option))
    except UsageError as error:
        raise UsageError(
            f"{option} is {text!r}, expected a speed such as 90GB/s or 100Mbit/s"
        ) from error
