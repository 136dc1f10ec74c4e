"""The head of a split, computed on P while D fetches the tail.

D reads it out of P's host tier as it comes, and knows by itself when it will not: so nothing here
is waited for, and what becomes of P ends no request.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kv.block import TOKEN_BYTES
from kv.plan import Hints, Shape, Source, Span
from router.audit import Record
from router.fleet import Fleet
from workers.errors import WorkerError
from workers.messages import Role, Submit

if TYPE_CHECKING:
    from router.run import Attempt

logger = logging.getLogger(__name__)


@contextmanager
def computing_head(fleet: Fleet, attempt: "Attempt", record: Record) -> Iterator[None]:
    """Have P compute a split's head until the block ends; nothing for other plans."""
    if attempt.plan.shape is not Shape.SPLIT:
        yield
        return
    task = asyncio.create_task(_compute(fleet, attempt, record))
    try:
        yield
    finally:
        task.cancel()  # what runs on P is aborted


async def _compute(fleet: Fleet, attempt: "Attempt", record: Record) -> None:
    head = _span(attempt)
    prefill = fleet.member(head.replica)
    if prefill is None:
        logger.info("%s: %s left before it was sent a head", attempt.engine_id, head.replica)
        return
    keys = attempt.keys[: head.end_token // fleet.block_tokens()]
    try:
        with attempt.expected(fleet, head.replica, head.tokens, keys):
            async with prefill.run(_submit(fleet, attempt, head)) as deltas:
                async for delta in deltas:
                    record.prefill_sources = delta.sources or record.prefill_sources
                    record.prefill_spent = delta.spent or record.prefill_spent
    except WorkerError as error:
        logger.info("%s goes on without its head: %s", attempt.engine_id, error)


def _submit(fleet: Fleet, attempt: "Attempt", head: Span) -> Submit:
    """The prompt as far as the head goes. What P has is a hit; more than that it computes. It
    gives way to others as its request does."""
    request = attempt.request
    return Submit(
        attempt.engine_id,
        Role.PREFILL,
        request.known[: head.end_token * TOKEN_BYTES],
        request.body,
        hints=Hints(head.start_token),
        keep=request.keep,
        lends=True,
        patience_s=request.patience_s(fleet.now()),
    )


def _span(attempt: "Attempt") -> Span:
    return next(span for span in attempt.plan.spans if span.source is Source.COMPUTE)
