"""Errors of the `kv` package.

KVError
├── BlockError      token ids or bytes that cannot be named as blocks
├── CatalogueError  a catalogue that cannot be built
├── CodecError      a page or frame that a codec refuses
├── CurveError      samples or coefficients that give no cost curve
├── DiskError       a disk tier that cannot be used
│   ├── DamagedBlockError  a stored block whose bytes are not what was stored
│   └── LostSlotError      a slot whose folder was taken away
├── PlanError       spans that do not cover a prompt, or a plan that cannot be shown
├── SizeError       a KV shape, or a model's config, without a size
├── TierError       a model whose blocks tiers cannot keep
└── VaultError      a vault that cannot be built, or an order it does not know
    ├── SegmentError  a folder of segments that cannot be used
    │   └── SegmentFullError  no room on the disk or in its budget
    ├── VaultLostError     a shard that does not answer, or not in time
    └── VaultMessageError  bytes that are no message of a vault
"""


class KVError(Exception):
    """Something in `kv` was refused: who, the numbers, and the remedy.

    Takes positional arguments only, so that it survives pickling between processes.
    """

    def __init__(self, subject: str, numbers: str, remedy: str) -> None:
        super().__init__(subject, numbers, remedy)

    def __str__(self) -> str:
        subject, numbers, remedy = self.args
        return f"{subject}: {numbers}; {remedy}"


class BlockError(KVError):
    """Token ids or packed bytes cannot be cut into blocks."""


class CatalogueError(KVError):
    """The catalogue cannot be built as asked."""


class CodecError(KVError):
    """A page cannot be encoded as asked, or a frame is not what it should be."""


class CurveError(KVError):
    """Samples or coefficients do not describe a cost."""


class DiskError(KVError):
    """The disk tier cannot be used."""


class DamagedBlockError(DiskError):
    """A stored block's bytes are not what was stored."""


class LostSlotError(DiskError):
    """A slot's folder was taken away while it was held."""


class PlanError(KVError):
    """A plan contradicts itself or cannot be shown in a header."""


class SizeError(KVError):
    """A KV shape has no size, or a model's config does not tell it."""


class TierError(KVError):
    """Tiers behind a model whose blocks cannot come back from them."""


class VaultError(KVError):
    """A vault's settings or an order to it make no sense."""


class SegmentError(VaultError):
    """A folder of segments cannot be read or written."""


class SegmentFullError(SegmentError):
    """A record does not fit: the disk is full, or the byte budget is."""


class VaultLostError(VaultError):
    """A shard does not answer, or not in time."""


class VaultMessageError(VaultError):
    """Bytes from a vault's client or shard are no message of this version."""
