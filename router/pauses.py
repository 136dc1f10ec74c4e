"""Python's own pauses, kept short."""

import gc


def freeze_start() -> None:
    """Take what a process has loaded out of sight of Python's cyclic garbage collector.

    Call once, when a process has imported and built what it keeps. A full collection walks every
    container alive, and stops the process meanwhile: the modules of an ingress alone are several
    hundred thousand. What is frozen is never walked again; what comes later is collected as usual.
    A catalogue needs no more than this: its shards hold bytes and ints alone, which CPython does
    not walk, however many blocks there are.
    """
    gc.collect()
    gc.freeze()
