"""A model's KV geometry, read from the plain dict of its config.json."""

from collections.abc import Mapping
from dataclasses import dataclass

from kv.dtypes import FLOAT_BYTES, element_bytes, named
from kv.errors import SizeError
from kv.geometry import Geometry
from kv.hf.architectures import Family, family
from kv.hf.fields import SUBJECT, Fields
from kv.hf.states import Elements

Config = Mapping[str, object]

# Multimodal models keep their language model under one of these, at most so deep.
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
_DEEPEST = 3
# Where a config names no dtype: the one that most checkpoints are published in.
_USUAL_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Model:
    """What a config says of KV. Dtypes are names; `kv_dtype` may be a quantised one."""

    model_type: str
    kv_dtype: str
    state_dtype: str
    geometry: Geometry


def read(config: object, *, dtype: str | None = None, state_dtype: str | None = None) -> Model:
    """The model that a parsed config.json describes.

    `dtype` takes the place of the config's: a float type is the whole model's, fp8 is that of keys
    and values alone. `state_dtype` is that of recurrent states. Raises SizeError for a config that
    is not known or makes no sense.
    """
    outer = _object(config, "it")
    text = _language_model(outer)
    model_type = _model_type(text, outer)
    its = family(model_type)
    fields = its.fields(text)
    model_dtype, kv_dtype = _dtypes(outer, text, dtype)
    recurrent = _float(state_dtype or _state_dtype(its, fields) or model_dtype)
    elements = Elements(*map(element_bytes, (kv_dtype, model_dtype, recurrent)))
    return Model(model_type, kv_dtype, recurrent, its.geometry(fields, elements))


def _object(value: object, name: str) -> Config:
    if not isinstance(value, dict):
        raise SizeError(SUBJECT, f"{name} is no JSON object", "give a Hugging Face config")
    return value


def _language_model(outer: Config) -> Config:
    text = outer
    for _ in range(_DEEPEST):
        nested = next((name for name in _NESTED if text.get(name) is not None), None)
        if nested is None:
            break
        text = _object(text[nested], nested)
    return text


def _model_type(text: Config, outer: Config) -> str:
    found = text.get("model_type") or outer.get("model_type")
    if not isinstance(found, str):
        raise SizeError(SUBJECT, "no model_type", "give a Hugging Face config")
    return found


def _dtypes(outer: Config, text: Config, asked: str | None) -> tuple[str, str]:
    """The model's and that of its keys and values."""
    stated = next(
        (d for c in (outer, text) for d in (c.get("dtype"), c.get("torch_dtype")) if d), None
    )
    chosen = named(asked) if asked is not None else None
    if chosen in FLOAT_BYTES:
        return chosen, chosen
    model = _float(stated if isinstance(stated, str) else _USUAL_DTYPE)
    return model, chosen or _quantised(outer) or _quantised(text) or model


def _float(name: str) -> str:
    found = named(name)
    if found not in FLOAT_BYTES:
        raise SizeError("dtype", f"{found} is not that of a model", "give a float type")
    return found


def _state_dtype(its: Family, fields: Fields) -> str | None:
    """What the config says of recurrent states; None for the model's own dtype."""
    stated = fields.text(its.state_dtype_key) if its.state_dtype_key else None
    return None if stated == "auto" else stated


def _quantised(config: Config) -> str | None:
    """The dtype of keys and values that a quantised checkpoint asks for (compressed-tensors'
    `kv_cache_scheme`, ModelOpt's `kv_cache_quant_algo`)."""
    whole = config.get("quantization_config") or {}
    inner = whole.get("quantization") if isinstance(whole, dict) else None
    for part in (whole, inner or {}):
        found = _object(part, "quantization_config")
        scheme = found.get("kv_cache_scheme") or found.get("kv_cache_quant_algo")
        if scheme is not None:
            return _eight_bits(scheme)
    return None


def _eight_bits(scheme: object) -> str:
    if isinstance(scheme, dict):
        eight = scheme.get("num_bits") == 8 and scheme.get("type") == "float"
    else:
        eight = isinstance(scheme, str) and scheme.lower() == "fp8"
    if not eight:
        raise SizeError(SUBJECT, "its KV quantisation is not fp8", "give --dtype")
    return "fp8"
