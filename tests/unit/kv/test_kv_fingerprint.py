import os
from pathlib import Path

from kv.fingerprint import engine_facts, fingerprint, folder_identity, snapshot_identity


def test_every_fact_counts_and_their_order_does_not() -> None:
    """Two sets of facts share a name only if they are the same."""
    base = {"dtype": "float32", "tp": 1}
    assert fingerprint(base) == fingerprint(dict(reversed(base.items())))
    assert len({fingerprint(f) for f in (base, {**base, "tp": 2}, {**base, "x": 0}, {})}) == 4


def test_options_that_only_schedule_do_not_count() -> None:
    """A batch size keeps what is stored; an option that nobody has thought about does not."""
    kept = engine_facts({"dtype": "float32", "max_num_seqs": 4, "brand_new": True})
    assert kept == {"dtype": "float32", "brand_new": True}


def test_a_model_folder_is_known_by_its_content(tmp_path: Path) -> None:
    """Other weights or another configuration in the same folder are another model."""
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    seen = [folder_identity(tmp_path)]
    assert folder_identity(tmp_path) == seen[0]
    (tmp_path / "README.md").write_text("words")
    assert folder_identity(tmp_path) == seen[0]
    weights.write_bytes(b"12345")
    seen.append(folder_identity(tmp_path))
    os.utime(weights, ns=(1, 1))
    seen.append(folder_identity(tmp_path))
    (tmp_path / "config.json").write_text('{"rope": 1}')
    seen.append(folder_identity(tmp_path))
    assert len(set(seen)) == 4


def test_weights_whose_times_are_kept_are_known_apart(tmp_path: Path) -> None:
    """Another checkpoint of the same size, copied with the times of the first, is another model;
    so is one whose own code changed."""
    weights, code = tmp_path / "model.safetensors", tmp_path / "modeling_own.py"
    weights.write_bytes(b"1234")
    os.utime(weights, ns=(1, 1))
    seen = [folder_identity(tmp_path)]
    weights.unlink()
    weights.write_bytes(b"4321")
    os.utime(weights, ns=(1, 1))
    seen.append(folder_identity(tmp_path))
    code.write_text("a = 1")
    seen.append(folder_identity(tmp_path))
    assert len(set(seen)) == 3


def test_an_unknown_commit_is_never_the_same_twice() -> None:
    """What could be another revision is not found again."""
    assert snapshot_identity("m", "abc") == snapshot_identity("m", "abc")
    assert snapshot_identity("m", None) != snapshot_identity("m", None)
