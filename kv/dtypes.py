"""The element types that KV and states are kept in."""

from kv.errors import SizeError

FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# vLLM's cache_dtype: KV alone is quantised to these, states are not.
QUANTISED_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
_SHORT = {
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "float8": "fp8",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
}


def named(text: str) -> str:
    """The usual name of a dtype; "torch.bfloat16" and "bf16" are "bfloat16".

    Raises SizeError for one whose size is unknown.
    """
    name = text.strip().lower().removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in FLOAT_BYTES and name not in QUANTISED_BYTES:
        known = ", ".join((*FLOAT_BYTES, *QUANTISED_BYTES))
        raise SizeError("dtype", f"{text[:40]!r} is not known", f"give one of {known}")
    return name


def element_bytes(name: str) -> int:
    """Bytes of one element of a dtype that `named` gave."""
    return FLOAT_BYTES.get(name) or QUANTISED_BYTES[name]
