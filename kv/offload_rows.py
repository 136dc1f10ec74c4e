"""The host tier's rows, where blocks of several kinds of layers share them.

A row has room for a block of the largest group of layers. A block of a smaller one leaves the rest
of its row as it was: with another tenant's KV in it, which an erasure of that tenant would not
reach, and which a tier behind would store under the new block's name.
"""

from collections.abc import Collection, Iterable

from vllm.v1.kv_offload.base import OffloadKey, PrepareStoreOutput, ReqContext
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager

from kv.offload_host import HostTier


class CleanRows(HostTier):
    """A host tier that overwrites a row before it is filled; the engine's thread pays for it, so
    it is for models with more than one group of layers."""

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        output = super().prepare_store(keys, req_context)
        if output is not None:
            overwrite(self, output.store_spec.chunk_ids.tolist())
        return output


def overwrite(primary: CPUPrimaryTierOffloadingManager, rows: Iterable[int]) -> None:
    """Fill rows of the host tier with zeros."""
    view = primary.get_kv_memoryview()
    for row in rows:
        content = view[row : row + 1].cast("B")
        content[:] = bytes(len(content))
