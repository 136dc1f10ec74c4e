"""Everything the router package raises, and the HTTP status of each.

RouterError
├── NoReplicaError      no replica can serve this request now         503
├── OverloadedError     the ingress holds as many requests as it may  503
├── RoomFullError       as many batch requests wait and run as may    429
├── RateLimitError      a tenant is over its limits                   429
├── TooManyError        one call asks for more answers than fit       400
├── UnservableError     a request that no engine can be given            400
├── AccessError         no key, or one that is not known              401
├── KeyFileError        the key file cannot be used                   500
├── OrderError          an order did not reach the cluster            503
├── DeadlineError       a request took longer than it may             504
└── RequestLostError    every plan for a request has failed           503
"""

from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.limits import Standing


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


class RoomFullError(RouterError):
    """The ingress holds as many batch requests as it may."""

    def __init__(self, held: int, limit: int) -> None:
        super().__init__(held, limit)
        self.held, self.limit = held, limit

    def __str__(self) -> str:
        return (
            f"{self.held} batch requests (service_tier flex) wait or run, {self.limit} allowed; "
            "send fewer at a time, or raise router.batch.max_requests"
        )


class RateLimitError(RouterError):
    """A tenant has as many requests in flight, or has used as many tokens, as it may."""

    def __init__(self, tenant: str, standing: "Standing") -> None:
        super().__init__(tenant, standing)
        self.tenant, self.standing = tenant, standing

    def __str__(self) -> str:
        limits, again = self.standing.limits, f"try again in {self.standing.retry_after_s} s"
        if self.standing.refused == "requests":
            held = f"{self.standing.in_flight} requests in flight, {limits.max_requests} allowed"
            return f"tenant {self.tenant}: {held}; {again}, or when one of them has ended"
        used = f"{limits.tokens_per_minute} tokens a minute allowed and used"
        if self.standing.left_tokens < 0:
            used += f", {-self.standing.left_tokens} more besides"
        return f"tenant {self.tenant}: {used}; {again}"


class TooManyError(RouterError):
    """One call asks for more answers than the ingress ever holds."""

    def __init__(self, wanted: int, limit: int) -> None:
        super().__init__(wanted, limit)
        self.wanted, self.limit = wanted, limit

    def __str__(self) -> str:
        return f"{self.wanted} answers wanted in one call, {self.limit} allowed; lower n"


class UnservableError(RouterError):
    """A request that cannot be written down for an engine."""

    def __init__(self, request_id: str, complaint: str) -> None:
        super().__init__(request_id, complaint)
        self.request_id, self.complaint = request_id, complaint

    def __str__(self) -> str:
        return f"request {self.request_id} cannot be served: {self.complaint}"


class AccessError(RouterError):
    """A request without a key, or with one that is not in force."""

    def __init__(self, kind: str, given: bool) -> None:
        super().__init__(kind, given)
        self.kind, self.given = kind, given

    def __str__(self) -> str:
        if self.given:
            return f"this {self.kind} is not known"
        return f"no {self.kind} was given; send it as `Authorization: Bearer KEY`"


class KeyFileError(RouterError):
    """The file of API keys cannot be read or used."""

    def __init__(self, path: str, complaint: str) -> None:
        super().__init__(path, complaint)
        self.path, self.complaint = path, complaint

    def __str__(self) -> str:
        return f"key file {self.path}: {self.complaint}; `breakeven key` prints a line for it"


class DeadlineError(RouterError):
    """A request took longer than its client or the configuration allows."""

    def __init__(self, request_id: str, timeout_s: float) -> None:
        super().__init__(request_id, timeout_s)
        self.request_id, self.timeout_s = request_id, timeout_s

    def __str__(self) -> str:
        return (
            f"request {self.request_id} is not done after {self.timeout_s:g} s; "
            "raise x-request-timeout, or ingress.request_timeout_s if that is lower"
        )


class OrderError(RouterError):
    """An operator's order could not be given to the cluster."""

    def __init__(self, complaint: str) -> None:
        super().__init__(complaint)
        self.complaint = complaint

    def __str__(self) -> str:
        return (
            f"the order was not taken and the last one stays in force: {self.complaint}; "
            "try again once Ray's GCS answers"
        )


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
    RoomFullError: HTTPStatus.TOO_MANY_REQUESTS,
    RateLimitError: HTTPStatus.TOO_MANY_REQUESTS,
    TooManyError: HTTPStatus.BAD_REQUEST,
    UnservableError: HTTPStatus.BAD_REQUEST,
    AccessError: HTTPStatus.UNAUTHORIZED,
    KeyFileError: HTTPStatus.INTERNAL_SERVER_ERROR,
    OrderError: HTTPStatus.SERVICE_UNAVAILABLE,
    DeadlineError: HTTPStatus.GATEWAY_TIMEOUT,
    RequestLostError: HTTPStatus.SERVICE_UNAVAILABLE,
}
