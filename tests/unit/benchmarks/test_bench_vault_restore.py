"""What the benchmark of restores from a vault takes for one, and what it makes of the times."""

from typing import Any

import pytest

from benchmarks.tiers.vault_restore import LABELS, check, rows


def answered(**changes: Any) -> dict[str, Any]:
    """An answer to a prompt of two blocks."""
    nothing = {"device": 0, "prompt_tokens_host": 0, "prompt_tokens_vault": 0, "failed_loads": 0}
    return nothing | {"computed": 5, "tokens": [1, 2]} | changes


RIGHT = {
    "cold": answered(computed=69),
    "hit": answered(device=64),
    "raw": answered(prompt_tokens_vault=64),
}
KNOWN = {"tokens": [1, 2]}


@pytest.mark.parametrize("what", RIGHT)
def test_a_visit_counts_where_its_tokens_came_from(what: str) -> None:
    """Only as what it is: another kind's answer under the same name is refused."""
    check(what, RIGHT[what], 2, KNOWN)
    for other, answer in RIGHT.items():
        if other != what:
            with pytest.raises(RuntimeError, match=what):
                check(what, answer, 2, KNOWN)


@pytest.mark.parametrize(
    "changes",
    [{"prompt_tokens_vault": 32, "computed": 37}, {"tokens": [1, 3]}, {"prompt_tokens_host": 32}],
)
def test_a_partial_restore_is_none(changes: dict[str, Any]) -> None:
    """Part of it computed, part of it from the host tier, or another answer."""
    with pytest.raises(RuntimeError, match="raw at 64 tokens"):
        check("raw", RIGHT["raw"] | changes, 2, KNOWN)


def test_ratios_are_of_rounds_and_meet_their_targets() -> None:
    """A slow round slows both sides of its ratio; int8 has a target of its own."""
    rounds = [
        {"prompts": {"4096": {name: [of * scale] for name, of in zip(LABELS, TIMES, strict=True)}}}
        for scale in (1.0, 1.0, 3.0)
    ]
    found = {row.name: row for row in rows(rounds)}
    raw = found["from the vault, against a device hit at 4096"]
    assert (raw.value, raw.target, raw.ok) == (2.2, 2.0, False)
    coded = found["from the vault by int8, against a device hit at 4096"]
    assert (coded.value, coded.target, coded.ok) == (2.4, 2.5, True)
    assert found["from the vault, against computed at 4096"].value == 0.11


# Seconds of each kind, in the order of LABELS: cold, hit, raw, int8.
TIMES = (20.0, 1.0, 2.2, 2.4)
