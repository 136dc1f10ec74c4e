import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster import verdicts
from cluster.config import engine_options, load
from cluster.errors import CodecRefusedError
from kv.codecs.codec import CodecName
from kv.codecs.frame import VERSION
from kv.codecs.gate import GateLimits, Verdict, gate_id
from kv.codecs.table import LOSSLESS
from workers import quality_prompts
from workers.tiers import model_identity

INT8, TQ4 = CodecName.INT8, CodecName.TQ4


def verdict(agreed_tokens: int = 288, delta: float = 0.09, prompts: str | None = None) -> Verdict:
    return Verdict(prompts or quality_prompts.digest(), VERSION, 288, agreed_tokens, delta)


def test_a_codec_that_passed_is_let_through_by_its_gates_name(tmp_path: Path) -> None:
    """The id is that of model, codec and limits, which the lossy namespace is named by."""
    verdicts.keep(tmp_path, "m", {INT8: verdict()})
    assert verdicts.check(tmp_path, "m", INT8) == gate_id("m", INT8, VERSION, GateLimits())


def test_a_codec_that_failed_is_refused_with_its_figures(tmp_path: Path) -> None:
    """The error names the codec, what was measured, and the command that measures again."""
    verdicts.keep(tmp_path, "m", {TQ4: verdict(agreed_tokens=200), INT8: verdict(delta=0.5)})
    command = r"`breakeven calibrate --codecs"
    with pytest.raises(CodecRefusedError, match=f"codec tq4: .*200 of 288 .*{command} tq4`"):
        verdicts.check(tmp_path, "m", TQ4)
    with pytest.raises(CodecRefusedError, match=r"codec int8: .*move by 0\.5, 0\.25 allowed"):
        verdicts.check(tmp_path, "m", INT8)
    assert verdicts.check(tmp_path, "m", INT8, GateLimits(max_logprob_delta=1.0))


def test_a_codec_without_a_verdict_is_refused(tmp_path: Path) -> None:
    """Of nothing at all, of another model, and of prompts that are not these any more."""
    for _ in range(2):
        with pytest.raises(CodecRefusedError, match=r"unmeasured.*calibrate"):
            verdicts.check(tmp_path, "m", INT8)
        verdicts.keep(tmp_path, "other", {INT8: verdict()})
    verdicts.keep(tmp_path, "m", {INT8: verdict(prompts="older")})
    with pytest.raises(CodecRefusedError, match="outdated"):
        verdicts.check(tmp_path, "m", INT8)


def test_a_lossless_codec_needs_no_verdict(tmp_path: Path) -> None:
    """Which those are is known without torch, and the same as by the codecs themselves."""
    assert set(LOSSLESS) == verdicts._LOSSLESS
    assert verdicts.check(tmp_path, "m", CodecName.RAW)


def test_a_file_that_is_no_verdict_file_refuses_and_is_replaced(tmp_path: Path) -> None:
    """Damage lets nothing through, and measuring again mends it."""
    (tmp_path / verdicts.FILE).write_text("{")
    with pytest.raises(CodecRefusedError, match="calibrate"):
        verdicts.check(tmp_path, "m", INT8)
    verdicts.keep(tmp_path, "m", {INT8: verdict()})
    assert verdicts.check(tmp_path, "m", INT8)


def test_verdicts_of_other_models_and_codecs_stay(tmp_path: Path) -> None:
    """Also when calibrations end at once; None takes one verdict away."""
    names = [f"model-{number}" for number in range(8)]
    threads = [
        threading.Thread(target=verdicts.keep, args=(tmp_path, name, {INT8: verdict()}))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdicts.keep(tmp_path, names[0], {TQ4: verdict()})
    assert all(verdicts.check(tmp_path, name, INT8) for name in names)
    verdicts.keep(tmp_path, names[0], {INT8: None})
    assert verdicts.read(tmp_path)[names[0]] == {TQ4: verdict()}


def test_the_prompts_are_enough_and_none_is_of_another() -> None:
    """The gate's tokens are met, and no prompt is found in the cache of another one."""
    texts = quality_prompts.texts()
    assert len(texts) * quality_prompts.ANSWER_TOKENS >= GateLimits().min_tokens
    heads = {text[:8] for text in texts}
    assert len(heads) == len(texts)
    assert all(text.isascii() and 600 < len(text) < 3000 for text in texts)


def test_a_cluster_starts_with_the_codec_that_its_model_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the id that names the namespace; one that did not pass ends the start with its figures,
    and without a vault, or a codec for it, there is nothing to pass."""
    monkeypatch.setenv("BREAKEVEN_CACHE", str(tmp_path))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert verdicts.gates(load(None, {}), model) == {}
    vault = {"memory_bytes": 1 << 20}
    assert verdicts.gates(load(None, {"tiers": {"vault": vault}}), model) == {}
    config = load(None, {"tiers": {"vault": {**vault, "lossy": "int8"}}})
    with pytest.raises(CodecRefusedError, match="unmeasured"):
        verdicts.gates(config, model)
    identity = model_identity(str(model), engine_options(config, config.decode))
    verdicts.keep(tmp_path, identity, {INT8: verdict()})
    assert verdicts.gates(config, model) == {INT8: gate_id(identity, INT8, VERSION, GateLimits())}


def test_gates_are_read_before_ray_is_loaded() -> None:
    """Ray reads its environment as it loads, and `serve` sets that later."""
    program = (
        "import sys; from cluster import verdicts; from cluster.config import load; "
        "vault = {'memory_bytes': 1 << 20, 'lossy': 'int8'}; "
        "config = load(None, {'tiers': {'vault': vault}})\n"
        "try: verdicts.gates(config, sys.argv[1])\n"
        "except Exception as error: print(error)\n"
        "sys.exit('ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "model"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "int8" in done.stdout
