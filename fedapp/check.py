"""Range checks for settings: each raises one ConfigError that names the value, the bound and the repair."""

from fedapp.errors import ConfigError


def whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """Require an int in [low, high]."""
    bound = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be {bound}, got {value!r}: set {name}={low}, for example")
    if value < low or (high is not None and value > high):
        nearest = low if value < low else high
        raise ConfigError(f"{name} must be {bound}, got {value}: set {name}={nearest}, for example")


def real(name: str, value: object, *, above: float | None = None, low: float | None = None,
         below: float | None = None, high: float | None = None) -> None:  # fmt: skip
    """Require a finite float; `above` and `below` are open bounds, `low` and `high` closed ones."""
    limits = (("above", above), ("at least", low), ("below", below), ("at most", high))
    bounds = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
    inside = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < float("inf")
        and (above is None or value > above)
        and (low is None or value >= low)
        and (below is None or value < below)
        and (high is None or value <= high)
    )
    if not inside:
        said = " and ".join(bounds) or "finite"
        raise ConfigError(f"{name} must be a number {said}, got {value!r}: set {name} within that bound")


def flag(name: str, value: object) -> None:
    """Require a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}: set {name}=true, for example")


def choice(name: str, value: object, options: tuple[str, ...]) -> None:
    """Require one of the given words."""
    if value not in options:
        raise ConfigError(f"{name} must be one of {', '.join(options)}, got {value!r}: choose one of them")


def text(name: str, value: object) -> None:
    """Require a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a text, got {value!r}: put it in quotes")
