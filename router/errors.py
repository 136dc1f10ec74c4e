"""Everything the router package raises, and the HTTP status of each.

RouterError
├── NoReplicaError      no replica can serve this request now         503
├── OverloadedError     the ingress holds as many requests as it may  503
├── TooManyError        one call asks for more answers than fit       400
└── RequestLostError    every plan for a request has failed           503
"""

from http import HTTPStatus


class RouterError(Exception):
    """Base of the tree; positional arguments only, so that each survives pickling."""


class NoReplicaError(RouterError):
    """No replica is up that could take the request."""

    def __init__(self, prefill_up: int, decode_up: int) -> None:
        super().__init__(prefill_up, decode_up)
        self.prefill_up, self.decode_up = prefill_up, decode_up

    def __str__(self) -> str:
        return (
            f"no replica can serve this request: {self.decode_up} decode and {self.prefill_up} "
            "prefill replicas are up; try again shortly"
        )


class OverloadedError(RouterError):
    """The ingress holds as many requests as it may."""

    def __init__(self, held: int, limit: int) -> None:
        super().__init__(held, limit)
        self.held, self.limit = held, limit

    def __str__(self) -> str:
        return f"{self.held} requests in flight, {self.limit} allowed; try again shortly"


class TooManyError(RouterError):
    """One call asks for more answers than the ingress ever holds."""

    def __init__(self, wanted: int, limit: int) -> None:
        super().__init__(wanted, limit)
        self.wanted, self.limit = wanted, limit

    def __str__(self) -> str:
        return f"{self.wanted} answers wanted in one call, {self.limit} allowed; lower n"


class RequestLostError(RouterError):
    """The replicas of a request failed, and so did the plans that followed."""

    def __init__(self, request_id: str, complaint: str) -> None:
        super().__init__(request_id, complaint)
        self.request_id, self.complaint = request_id, complaint

    def __str__(self) -> str:
        return f"request {self.request_id}: {self.complaint}"


STATUS: dict[type[RouterError], HTTPStatus] = {
    NoReplicaError: HTTPStatus.SERVICE_UNAVAILABLE,
    OverloadedError: HTTPStatus.SERVICE_UNAVAILABLE,
    TooManyError: HTTPStatus.BAD_REQUEST,
    RequestLostError: HTTPStatus.SERVICE_UNAVAILABLE,
}
