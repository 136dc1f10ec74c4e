"""Blocks whose bytes follow from their number."""

from random import Random


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def payload_of(number: int) -> bytes:
    random = Random(number)
    return random.randbytes(random.randrange(1, 3000))
