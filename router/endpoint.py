"""An ingress's own answer to Prometheus. Several ingresses of one node share the port of their
API, and whoever asks that for `/metrics` is answered by any of them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from prometheus_client import CollectorRegistry, make_asgi_app


class QuietServer(uvicorn.Server):
    """uvicorn without signal handlers: its process belongs to Ray."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class IngressEndpoint:
    """Listens on a free port of `host` once made; answers on this event loop, whose state the
    collectors read, while `serve` runs."""

    def __init__(self, host: str, registry: CollectorRegistry) -> None:
        self._socket = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        self._app = make_asgi_app(registry)
        self.address = f"{host}:{self._socket.getsockname()[1]}"

    async def serve(self) -> None:
        """Until cancelled."""
        config = uvicorn.Config(self._app, log_config=None, access_log=False, lifespan="off")
        with self._socket:
            await QuietServer(config).serve([self._socket])
