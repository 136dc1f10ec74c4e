"""What a request had fetched into the host tier from those behind it, and how long it waits."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

# In a request's kv_transfer_params: seconds after which what tiers still have to bring is computed.
DEADLINE = "load_deadline_s"

_State = TypeVar("_State")


@dataclass(slots=True)
class Promoted:
    """The state of one request; `keys` were fetched for it once and are not fetched again. Once it
    is `late` it waits for nothing more."""

    keys: set[bytes] = field(default_factory=set)
    waits_since_s: float | None = None
    late: bool = False

    def overran(self, deadline_s: float, now_s: float) -> bool:
        """Whether it has waited longer than it may. To be asked whenever it has to wait: the first
        time starts its clock."""
        if self.waits_since_s is None:
            self.waits_since_s = now_s
        self.late = self.late or now_s - self.waits_since_s >= deadline_s
        return self.late


def state_of(req_context: Any, kind: type[_State]) -> _State:
    """What is known of one request, of this kind; `req_context` is vLLM's."""
    state: _State = req_context.get_state(kind) or kind()
    req_context.set_state(state)
    return state
