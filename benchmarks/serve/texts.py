"""Prompts of a wanted length: words that the default model's tokenizer takes for one token each."""

import json
import random
import re
from functools import cache

from benchmarks.models import model

# The tokenizer writes the space before a word as this letter.
_WORD = re.compile("\u0120([a-z]{3,8})")


@cache
def _vocabulary() -> list[str]:
    known = json.loads((model() / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(found[1] for token in known if (found := _WORD.fullmatch(token)))


def words(rng: random.Random, tokens: int) -> str:
    """Text of about `tokens` tokens that no cache holds; equal generators give equal text."""
    return " ".join(rng.choice(_vocabulary()) for _ in range(tokens))
