"""Sizes as people write them."""

import pytest

from localv4.cli.sizes import parse_bytes, parse_rate
from localv4.errors import UsageError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        ("8gb", 8 * 10**9),
        ("1.5 MiB", 3 << 19),
        ("512", 512),
        ("2TiB", 2 << 40),
        ("7b", 7),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text, "--ram") == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 GiBs", "1e9", "0", "0.1", "9" * 30, "8,5G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--ram is"):
        parse_bytes(text, "--ram")


def test_rates() -> None:
    assert parse_rate("90GB/s", "--x") == parse_rate("90GB", "--x") == 90e9
    assert parse_rate("100Mbit/s", "--x") == 100e6 / 8
    with pytest.raises(UsageError, match="--x is 'fast', expected a speed such as 90GB/s or 100Mb"):
        parse_rate("fast", "--x")
