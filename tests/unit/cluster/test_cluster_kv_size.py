"""`breakeven kv-size`: what it finds, prints and refuses."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import model_config
from cluster.cli import main
from cluster.errors import ModelConfigError
from cluster.kv_size import _size
from cluster.model import MODEL_NAME
from tests import known_configs as configs

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(config: object, folder: str = "model") -> Path:
        path = tmp_path / folder / "config.json"
        path.parent.mkdir()
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return path

    return write


def _json(capsys: Captured, *words: str) -> dict[str, Any]:
    assert main(["kv-size", *words, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def _refused(capsys: Captured, *words: str) -> str:
    assert main(["kv-size", *words]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_a_folder_and_its_config_are_the_same(written: Any, capsys: Captured) -> None:
    """Either names the model."""
    path = written(configs.LLAMA_3_1_8B)
    by_file, by_folder = (_json(capsys, str(each)) for each in (path, path.parent))
    assert by_file == by_folder
    assert by_file["bytes_per_token"] == 131_072
    assert by_file["config"] == str(path)


def test_default_is_the_model_that_serve_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """In the cache; where it is not there yet, the remedy is named."""
    monkeypatch.setenv("BREAKEVEN_CACHE", str(tmp_path))
    assert "make setup" in _refused(capsys, "default")
    folder = tmp_path / "models" / MODEL_NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(configs.SMOLLM2_135M))
    assert _json(capsys, "default")["bytes_per_token"] == 23_040


def test_requests_are_priced_by_length(written: Any, capsys: Captured) -> None:
    """1k, 8k and what was asked for, in order, with how many fit in a GiB."""
    report = _json(capsys, str(written(configs.LLAMA_3_1_8B)), "--tokens", "2000")
    assert [each["tokens"] for each in report["requests"]] == [1024, 2000, 8192]
    assert [each["bytes"] for each in report["requests"]] == [1 << 27, 2000 << 17, 1 << 30]
    assert [each["fit_in_gib_a_rank"] for each in report["requests"]] == [8, 4, 1]
    assert report["groups"][0]["request_bytes"] == [1 << 27, 2000 << 17, 1 << 30]


def test_groups_add_up(written: Any, capsys: Captured) -> None:
    """Windows, states and the rest are shown apart; their sums are the totals."""
    for number, config in enumerate((configs.GEMMA_3_4B, configs.QWEN3_5_35B_A3B)):
        report = _json(capsys, str(written(config, str(number))), "--tokens", "70000", "--tp", "2")
        groups, requests = report["groups"], report["requests"]
        assert len(groups) == 2
        for key in ("bytes_per_token", "state_bytes"):
            assert sum(group[key] for group in groups) == report[key]
        for column, request in enumerate(requests):
            assert sum(group["request_bytes"][column] for group in groups) == request["bytes"]
            assert request["bytes"] == 2 * request["rank_bytes"]


def test_ranks_and_dtypes_are_options(written: Any, capsys: Captured) -> None:
    """fp8 halves bf16; 16 ranks repeat 8 KV heads twice."""
    report = _json(capsys, str(written(configs.LLAMA_3_1_8B)), "--dtype", "fp8", "--tp", "16")
    assert (report["kv_dtype"], report["ranks"]) == ("fp8", 16)
    assert report["bytes_per_token"] == 131_072
    assert report["rank"]["bytes_per_token"] == 8192


def test_a_table_is_for_people(
    written: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact bytes in the headline, groups and requests below."""
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["kv-size", str(written(configs.GEMMA_3_4B))]) == 0
    said = capsys.readouterr().out
    assert "gemma3_text: 139,264 bytes of bfloat16 KV a token, 20,480 past the window" in said
    assert "4 heads x 256, last 1,024 tokens" in said
    assert "requests in a GiB" in said
    path = written(configs.QWEN3_5_35B_A3B, "hybrid")
    assert main(["kv-size", str(path), "--state-dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "20,480 bytes of bfloat16 KV a token; 64,389,120 of state a request (float32)" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no JSON text"),
        ("{", "no JSON text"),
        ("[" * 100_000, "no JSON text"),
        ("[]", "no JSON object"),
        ('{"model_type": "t5"}', "model_type 't5' is not known"),
        ('{"model_type": "llama", "num_hidden_layers": -1}', "num_hidden_layers is -1"),
        (f'{{"model_type": "llama", "num_hidden_layers": {"9" * 5000}}}', "no JSON text"),
    ],
)
def test_a_config_that_gives_no_size_is_refused(
    text: str, says: str, written: Any, capsys: Captured
) -> None:
    """One line with the path and the reason; exit status 1."""
    path = written(text)
    said = _refused(capsys, str(path))
    assert str(path) in said
    assert says in said


def test_what_is_no_config_is_refused(tmp_path: Path, capsys: Captured) -> None:
    """Nothing there, an empty folder, a pipe, bytes, a device without end, names without sense."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    os.mkfifo(tmp_path / "config.json")
    for name in ("absent", "bytes", "config.json"):
        assert str(tmp_path / name) in _refused(capsys, str(tmp_path / name))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in _refused(capsys, str(empty))
    for name in ("/dev/zero", "a\0b", "x" * 5000, "no-such/model", "https://there/is/none"):
        assert len(_refused(capsys, name)) < 400


def test_a_huge_file_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """A weight file in place of a config costs no memory."""
    monkeypatch.setattr(model_config, "MAX_BYTES", 1 << 20)
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(1 << 40)
    assert "more than 1 MiB" in _refused(capsys, str(tmp_path / "weights"))


def test_ranks_that_cannot_share_are_refused(written: Any, capsys: Captured) -> None:
    """The remedy goes with it."""
    said = _refused(capsys, str(written(configs.LLAMA_3_1_8B)), "--tp", "3")
    assert "8 KV heads on 3 ranks" in said


@pytest.mark.parametrize("option", ["--tokens", "--tp"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "9" * 30, "", "²"])
def test_counts_are_whole_numbers(option: str, value: str, capsys: Captured) -> None:
    """Usage errors: exit status 2, as of every command."""
    with pytest.raises(SystemExit) as error:
        main(["kv-size", "default", f"{option}={value}"])
    assert error.value.code == 2
    assert "is no whole number" in capsys.readouterr().err


@given(st.text(max_size=30))
def test_any_name_gives_a_path_or_a_reason(name: str) -> None:
    """Whatever is typed."""
    with contextlib.suppress(ModelConfigError):
        path, _ = model_config.read(name)
        assert path.is_file()


def test_a_downloaded_model_goes_by_its_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """From the hub's cache of this machine; nothing is fetched."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = tmp_path / "models--acme--small" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(configs.QWEN3_4B))
    refs = tmp_path / "models--acme--small" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    assert _json(capsys, "acme/small")["bytes_per_token"] == 144 << 10
    assert "acme/other: no such file" in _refused(capsys, "acme/other")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (23_040, "22.5 KiB"),
        (70_272, "68.62 KiB"),
        (1 << 47, "128 TiB"),
    ],
)
def test_sizes_are_short(n_bytes: int, text: str) -> None:
    """Two decimals where they say something."""
    assert _size(n_bytes) == text
