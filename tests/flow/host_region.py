"""Memory of a host tier without an engine."""

import os
import secrets

from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion


def host_region(rows: int, page_bytes: int) -> SharedOffloadRegion:
    """So many rows. Its name is gone at once, as `kv.offload` does it: it goes with the process."""
    name = f"test-{secrets.token_hex(8)}"
    region = SharedOffloadRegion(name, rows, None, page_bytes, page_bytes)
    os.unlink(region.mmap_path)
    region._creator = False
    return region
