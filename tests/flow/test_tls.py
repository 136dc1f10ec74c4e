"""A cluster that serves HTTPS, with a certificate that signed itself for a public name."""

import json
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.certificates import Made, make
from tests.flow.cluster_process import ROOT, Cluster, start

pytestmark = pytest.mark.real_model
NAME = "api.example.org"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("certificate"), NAME)


@pytest.fixture(scope="module")
def secure(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    free_port: Callable[[], int],
    made: Made,
) -> Iterator[Cluster]:
    tmp = tmp_path_factory.mktemp("secure")
    config = tmp / "config.yaml"
    config.write_text(
        f"ingress: {{tls_cert_file: {made.cert_file}, tls_key_file: {made.key_file}}}\n"
    )
    words = ("--config", str(config), "--model", str(tiny_model), "--prefill", "0")
    memory = ("--engine-arg", "kv_cache_memory_bytes=67108864")
    cluster = start(tmp / "run", tiny_model.parent, free_port(), *words, *memory, scheme="https")
    yield cluster
    cluster.command("down")
    cluster.process.wait(30)


def test_a_client_that_trusts_the_certificate_is_answered(secure: Cluster, made: Made) -> None:
    """Under the certificate's own name, as a client beyond this machine checks it; streams too."""
    trusting = ssl.create_default_context(cafile=made.cert_file)
    body = {"model": "smollm2", "prompt": [5, 6, 7], "max_tokens": 4, "stream": True}
    with httpx.Client(verify=trusting, timeout=60) as client:
        request = client.build_request(
            "POST", f"{secure.url}/v1/completions", json=body, extensions={"sni_hostname": NAME}
        )
        answer = client.send(request)
    assert answer.status_code == 200
    assert answer.text.rstrip().endswith("data: [DONE]")
    assert answer.headers["x-breakeven-plan"].startswith("local")


def test_others_get_an_error_and_no_answer(secure: Cluster, made: Made) -> None:
    """Plain HTTP, a client that does not know the issuer, one that expects another name; and
    the next client is served."""
    with pytest.raises(httpx.TransportError):
        httpx.get(secure.url.replace("https", "http") + "/healthz")
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{secure.url}/healthz")
    knowing = ssl.create_default_context(cafile=made.cert_file)
    with pytest.raises(httpx.ConnectError, match="IP address mismatch"):
        httpx.get(f"{secure.url}/healthz", verify=knowing)
    assert secure.command("status").returncode == 0


def test_our_commands_reach_it(secure: Cluster) -> None:
    """status, doctor and a second `serve` find the cluster, whatever names its certificate has."""
    status = json.loads(secure.command("status", "--json").stdout)
    assert status["url"] == secure.url
    assert status["ready"] is True
    assert [row["state"] for row in status["replicas"]] == ["up"]
    doctor = secure.command("doctor", "--json")
    assert "decode-0" in {found["subject"] for found in json.loads(doctor.stdout)["findings"]}
    second = secure.command("serve")
    assert second.returncode == 1
    assert f"already runs at {secure.url}" in second.stderr


def test_somebody_else_at_its_address_is_not_believed(secure: Cluster, tmp_path: Path) -> None:
    """A server with another certificate, even for the same name, is refused in one sentence."""
    other = make(tmp_path / "other", NAME)
    script = (
        "import http.server,ssl,sys\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\n"
        "context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
        "context.load_cert_chain(*sys.argv[1:])\n"
        "server.socket = context.wrap_socket(server.socket, server_side=True)\n"
        "print(server.server_port, flush=True)\n"
        "server.serve_forever()\n"
    )
    words = [sys.executable, "-c", script, str(other.cert_file), str(other.key_file)]
    stranger = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    file = secure.cache / "cluster.json"
    state = file.read_text()
    try:
        assert stranger.stdout is not None
        url = f"https://127.0.0.1:{stranger.stdout.readline().strip()}"
        file.write_text(json.dumps({**json.loads(state), "url": url}))
        status = secure.command("status")
        doctor = secure.command("doctor", "--json")
    finally:
        file.write_text(state)
        stranger.kill()
        stranger.communicate()
    assert status.returncode == 1
    assert "TLS failed: self-signed certificate" in status.stderr
    assert "Traceback" not in status.stderr
    findings = {found["subject"]: found for found in json.loads(doctor.stdout)["findings"]}
    assert findings["TLS"]["verdict"] == "fail"
