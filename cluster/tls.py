"""TLS of the ingress: files that are tried before anything starts, and how our commands trust them.

Commands pin the certificate itself: an ingress proves that it has its key, whichever names and
issuer the certificate carries. So they work on loopback with a certificate for a public name, and
with a self-signed one, and still nobody else can answer in its place.
"""

import re
import ssl
from pathlib import Path

from cluster.errors import ConfigError

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)
# Each round carries what one side has to say to the other; TLS needs two or three.
_ROUNDS = 6


def check(cert_file: str, key_file: str) -> None:
    """Raise `ConfigError` unless both can be read, belong together, and serve a client now."""
    certificate = read_leaf(cert_file)
    _read(key_file, "ingress.tls_key_file")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        client = pinning(certificate)
    except ssl.SSLError as error:
        complaint = f"{cert_file} holds a broken certificate: {reason(error)}"
        raise ConfigError("ingress.tls_cert_file", complaint) from error
    try:
        # Without a callback OpenSSL asks the terminal for the key's password.
        server.load_cert_chain(cert_file, key_file, password=lambda: "")
    except ssl.SSLError as error:
        raise ConfigError("ingress.tls_key_file", _complaint(error, cert_file, key_file)) from error
    try:
        _greet(server, client)
    except ssl.SSLError as error:
        raise ConfigError("ingress.tls_cert_file", f"{cert_file}: {reason(error)}") from error


def read_leaf(cert_file: str) -> str:
    """The server's own certificate as PEM: the first in its file, before those of its issuers.

    Raises `ConfigError`.
    """
    found = _CERTIFICATE.search(_read(cert_file, "ingress.tls_cert_file"))
    if found is None:
        raise ConfigError("ingress.tls_cert_file", f"{cert_file} holds no certificate in PEM")
    return found[0]


def pinning(certificate: str) -> ssl.SSLContext:
    """A client's context that trusts this one certificate, under any name, and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # Else OpenSSL wants the issuer too, up to one that signed itself.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate)
    return context


def trust(certificate: str | None) -> ssl.SSLContext | None:
    """The context for a cluster's address: `pinning`, or None where it serves plain HTTP."""
    return None if certificate is None else pinning(certificate)


def reason(error: ssl.SSLError) -> str:
    """OpenSSL's words, without its file and line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    said = error.reason or str(error).split(" (_ssl.c")[0]
    return said.lower().replace("_", " ")


def _complaint(error: ssl.SSLError, cert_file: str, key_file: str) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{key_file} is not the key of {cert_file}"
    return (
        f"{key_file} cannot be used with {cert_file} ({reason(error)}): both are PEM files, and "
        "the key has no password"
    )


def _read(path: str, key: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise ConfigError(key, f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(key, f"{path} is no PEM file") from error


def _greet(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A handshake between the two, in memory; raises what a client would see."""
    upwards, downwards = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(downwards, upwards),
        server.wrap_bio(upwards, downwards, server_side=True),
    )
    waiting = set(ends)
    for _ in range(_ROUNDS):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.discard(end)
    if waiting:
        raise ssl.SSLError("the handshake does not end")
