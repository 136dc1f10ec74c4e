"""TLS: which files are refused, with which words, and whom our own commands trust."""

import ssl
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from cluster import launch, tls
from cluster.config import load
from cluster.errors import ConfigError
from tests.certificates import Made, make


def _config(cert_file: object, key_file: object, **ingress: object) -> dict[str, object]:
    files = {"tls_cert_file": str(cert_file), "tls_key_file": str(key_file)}
    return {"ingress": {**files, **ingress}}


def _served(made: Made) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.cert_file, made.key_file)
    return context


def test_a_certificate_and_its_key_serve_https(tmp_path: Path) -> None:
    """Self-signed or issued by somebody; the address says https, and IPv6 has its brackets."""
    issuer = make(tmp_path / "ca", "ca", is_ca=True)
    for made in (make(tmp_path / "self"), make(tmp_path / "issued", issuer=issuer)):
        config = load(None, _config(made.cert_file, made.key_file))
        assert config.ingress.url == "https://127.0.0.1:8000"
    config = load(None, _config(made.cert_file, made.key_file, host="::1", port=9))
    assert config.ingress.url == "https://[::1]:9"
    assert load(None, {}).ingress.url == "http://127.0.0.1:8000"


@pytest.mark.parametrize("missing", ["tls_cert_file", "tls_key_file"])
def test_one_file_without_the_other_is_refused(tmp_path: Path, missing: str) -> None:
    """The message names the one that is missing."""
    made = make(tmp_path)
    config = _config(made.cert_file, made.key_file)
    config["ingress"][missing] = None  # type: ignore[index]
    with pytest.raises(ConfigError, match=f"ingress.{missing} is missing"):
        load(None, config)


def test_files_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    """Unreadable, not PEM, of two pairs, locked, expired, not for servers: each in its words."""
    made, other = make(tmp_path / "one"), make(tmp_path / "other")
    (tmp_path / "text").write_text("no PEM at all")
    (tmp_path / "torn").write_text(made.cert_file.read_text().replace("M", "!"))
    locked = make(tmp_path / "locked", password=b"secret")
    expired = make(tmp_path / "expired", expired=True)
    client = make(tmp_path / "client", usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    for cert_file, key_file, says in (
        (tmp_path / "none", made.key_file, "tls_cert_file: .*/none cannot be read: No such file"),
        (made.cert_file, tmp_path / "none", "tls_key_file: .*/none cannot be read: No such file"),
        (tmp_path, made.key_file, "cannot be read: Is a directory"),
        (tmp_path / "text", made.key_file, "text holds no certificate in PEM"),
        (made.key_file, made.key_file, "key.pem holds no certificate"),
        (tmp_path / "torn", made.key_file, "torn holds a broken certificate"),
        (made.cert_file, tmp_path / "text", "text cannot be used"),
        (made.cert_file, made.cert_file, "cert.pem cannot be used"),
        (made.cert_file, other.key_file, "key.pem is not the key of .*cert.pem"),
        (locked.cert_file, locked.key_file, "the key has no password"),
        (expired.cert_file, expired.key_file, "certificate has expired"),
        (client.cert_file, client.key_file, "unsuitable certificate purpose"),
    ):
        with pytest.raises(ConfigError, match=says):
            load(None, _config(cert_file, key_file))


def test_only_the_very_certificate_is_trusted(tmp_path: Path) -> None:
    """Whatever its names; one of the same issuer, or one that says the same, is not it."""
    issuer = make(tmp_path / "ca", "ca", is_ca=True)
    ours, sibling = (make(tmp_path / name, issuer=issuer) for name in ("ours", "sibling"))
    again = make(tmp_path / "again")
    pinned = tls.pinning(tls.read_leaf(str(ours.cert_file)))
    tls._greet(_served(ours), pinned)
    for stranger in (sibling, again, issuer):
        with pytest.raises(ssl.SSLCertVerificationError):
            tls._greet(_served(stranger), tls.pinning(tls.read_leaf(str(ours.cert_file))))


def test_nothing_is_issued_by_a_pinned_certificate(tmp_path: Path) -> None:
    """A certificate that is no authority cannot vouch for another one."""
    ours = make(tmp_path / "ours")
    issued = make(tmp_path / "issued", issuer=ours)
    with pytest.raises(ssl.SSLCertVerificationError):
        tls._greet(_served(issued), tls.pinning(tls.read_leaf(str(ours.cert_file))))


def test_keys_in_clear_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, where keys cross a network without TLS; not on loopback, nor with TLS."""
    made, keys = make(tmp_path), {"keys_file": "keys.yaml"}
    tls_files = _config(made.cert_file, made.key_file)["ingress"]
    for quiet in (keys, {**tls_files, **keys, "host": "0.0.0.0"}):  # type: ignore[dict-item]
        launch._warn_of_clear_text(load(None, {"ingress": quiet}))
        assert capsys.readouterr().err == ""
    launch._warn_of_clear_text(load(None, {"ingress": {**keys, "host": "0.0.0.0"}}))
    [line] = capsys.readouterr().err.splitlines()
    assert "in clear to http://0.0.0.0:8000" in line
    assert "tls_cert_file" in line
