"""Which layers of a model keep what, read from its config."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kv.errors import SizeError
from kv.hf.fields import SUBJECT, Fields

_KINDS = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "linear_attention": "state",
    "mamba": "state",
    # Layers of feed-forward alone keep nothing.
    "moe": "none",
    "mlp": "none",
}
_NEMOTRON = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True, slots=True)
class Layers:
    """How many layers are of each kind."""

    full: int = 0
    sliding: int = 0
    state: int = 0


def _listed(fields: Fields) -> Layers | None:
    """What `layer_types` says; None without it."""
    words = fields.words("layer_types")
    return None if words is None else _by_kind(words, fields.layers(), "layer_types")


def _by_kind(words: Sequence[str], layers: int, name: str) -> Layers:
    unknown = sorted(set(words) - set(_KINDS))
    if unknown:
        raise SizeError(SUBJECT, f"{name} has {unknown[0][:40]!r}", "its KV is not known")
    if len(words) != layers:
        raise SizeError(SUBJECT, f"{len(words)} {name}, {layers} layers", "make them agree")
    found = Counter(_KINDS[word] for word in words)
    return Layers(found["full"], found["sliding"], found["state"])


def uniform(fields: Fields) -> Layers:
    """A window, where there is one, is every layer's."""
    if (listed := _listed(fields)) is not None:
        return listed
    layers = fields.layers()
    return Layers(sliding=layers) if fields.zero_or("sliding_window") else Layers(full=layers)


def every_nth_full(fields: Fields) -> Layers:
    """Windows but for each n-th layer: `sliding_window_pattern` is n, or letters such as LLLG
    with the last layer always whole."""
    if (listed := _listed(fields)) is not None:
        return listed
    layers = fields.layers()
    if not fields.zero_or("sliding_window"):
        return Layers(full=layers)
    if (letters := fields.text("sliding_window_pattern")) is not None:
        period = max(len(letters), 1)
        whole = sum(letters[i % period : i % period + 1] == "G" for i in range(layers - 1)) + 1
    else:
        whole = layers // fields.count("sliding_window_pattern")
    return Layers(full=whole, sliding=layers - whole)


def switched(fields: Fields) -> Layers:
    """Windows count only with `use_sliding_window`, from layer `max_window_layers` on."""
    layers = fields.layers()
    if not fields.flag("use_sliding_window") or not fields.zero_or("sliding_window"):
        return Layers(full=layers)
    if (listed := _listed(fields)) is not None:
        return listed
    whole = min(layers, fields.zero_or("max_window_layers"))
    return Layers(full=whole, sliding=layers - whole)


def unwindowed(fields: Fields) -> Layers:
    """Every layer attends to everything; with `use_sliding_window` no checkpoint is known."""
    if fields.flag("use_sliding_window"):
        raise SizeError(SUBJECT, "use_sliding_window is true", "its windows are not known")
    return Layers(full=fields.layers())


def every_nth_attends(fields: Fields) -> Layers:
    """Linear attention but for each `full_attention_interval`-th layer."""
    if (listed := _listed(fields)) is not None:
        return listed
    layers = fields.layers()
    whole = layers // fields.count("full_attention_interval")
    return Layers(full=whole, state=layers - whole)


def jamba(fields: Fields) -> Layers:
    """Mamba but for the layers of `attn_layer_period`, from `attn_layer_offset` on."""
    layers, period = fields.layers(), fields.count("attn_layer_period")
    whole = len(range(fields.zero_or("attn_layer_offset"), layers, period))
    return Layers(full=whole, state=layers - whole)


def granite_hybrid(fields: Fields) -> Layers:
    """As listed; mamba throughout without a list."""
    return _listed(fields) or Layers(state=fields.layers())


def nemotron_h(fields: Fields) -> Layers:
    """A letter or a word a layer, feed-forward ones too; `num_hidden_layers` counts for nothing."""
    name, words = "hybrid_override_pattern", fields.words("layers_block_type")
    if (letters := fields.text(name)) is not None:
        words = [_NEMOTRON.get(letter, letter) for letter in letters]
    if words is None:
        raise SizeError(SUBJECT, f"no {name}", "add it, a letter a layer")
    return _by_kind(words, len(words), name)
