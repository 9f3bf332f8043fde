"""What of the bench can be chosen in the environment."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured; the defaults take some five minutes on two cores."""

    rounds: int = 5
    """How often each interleaved case is measured."""
    waves: tuple[int, ...] = (1, 5, 10, 20)
    """How many pods are started at once."""
    idle: tuple[int, ...] = (1, 10, 20)
    """For how many idle pods memory is read."""
    megabytes: int = 200
    """How much a container writes to its stdout."""


def from_environment(environment: Mapping[str, str]) -> Options:
    """Return the options that ROUNDS, WAVES, IDLE (lists with commas) and MEGABYTES name.

    Raises ValueError naming the variable.
    """
    default = Options()
    return Options(
        rounds=_numbers(environment, "ROUNDS", (default.rounds,))[0],
        waves=_numbers(environment, "WAVES", default.waves),
        idle=_numbers(environment, "IDLE", default.idle),
        megabytes=_numbers(environment, "MEGABYTES", (default.megabytes,))[0],
    )


def _numbers(environment: Mapping[str, str], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return the numbers of a variable, the smallest first; an empty one stands for the default."""
    text = environment.get(name) or ",".join(map(str, default))
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{name} is {text!r}; it takes numbers above 0, such as {','.join(map(str, default))}")
    return tuple(sorted({int(word) for word in words}))
