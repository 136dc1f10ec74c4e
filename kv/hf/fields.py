"""Checked access to a Hugging Face config, which comes from anywhere."""

from collections.abc import Mapping, Sequence

from kv.errors import SizeError

# The longest lists of layers, and the largest numbers, that a config may ask for.
MAX_LAYERS = 10_000
MAX_COUNT = 1 << 31
# Whom errors are about; whoever knows the file says its path instead.
SUBJECT = "model config"


class Fields:
    """A config's values by their first known name, over a family's defaults.

    Raises SizeError for what is absent or not of its kind.
    """

    def __init__(self, config: Mapping[str, object], defaults: Mapping[str, object]) -> None:
        self._config, self._defaults = config, defaults

    def count(self, *names: str) -> int:
        """A whole number from 1 to MAX_COUNT, by the first of `names` that has one."""
        found = self.optional(*names)
        if found is None:
            raise SizeError(SUBJECT, f"no {' or '.join(names)}", "add it, a whole number")
        return found

    def optional(self, *names: str) -> int | None:
        """As `count`; None where every name is absent or null."""
        for name in names:
            value = self._get(name)
            if value is not None:
                return _counted(name, value, 1)
        return None

    def zero_or(self, name: str) -> int:
        """As `optional`, and 0 for what is absent, null or 0."""
        value = self._get(name)
        return 0 if value is None else _counted(name, value, 0)

    def flag(self, name: str) -> bool:
        """True or false; what is absent or null is false."""
        value = self._get(name)
        if value is not None and not isinstance(value, bool):
            raise SizeError(SUBJECT, f"{name} is {_shown(value)}", "give true or false")
        return bool(value)

    def words(self, name: str) -> Sequence[str] | None:
        """A list of strings, None where it is absent or null."""
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise SizeError(SUBJECT, f"{name} is {_shown(value)}", "give a list of strings")
        return value

    def text(self, name: str) -> str | None:
        """A string; None where it is absent, null or something else."""
        value = self._get(name)
        return value if isinstance(value, str) else None

    def layers(self) -> int:
        """How many layers there are, MAX_LAYERS at most."""
        layers = self.count("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        if layers > MAX_LAYERS:
            raise SizeError(SUBJECT, f"{layers} layers", f"give {MAX_LAYERS} at most")
        return layers

    def _get(self, name: str) -> object:
        """A stated null stays one: it says "none" where the default is a number."""
        return self._config[name] if name in self._config else self._defaults.get(name)


def _counted(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_COUNT:
        wanted = f"give a whole number from {least} to {MAX_COUNT}"
        raise SizeError(SUBJECT, f"{name} is {_shown(value)}", wanted)
    return value


def _shown(value: object) -> str:
    """Enough of it to find it; a number of a million digits cannot even be printed."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:40]}..."
