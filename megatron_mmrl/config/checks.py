"""Range checks whose messages name the key, the value and what is allowed."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def at_least(key: str, value: float, low: float) -> None:
    """Refuse ``value`` below ``low``."""
    require(value >= low, f"{key}={value}: must be at least {low}")


def within(key: str, value: float, low: float, high: float) -> None:
    """Refuse ``value`` outside [low, high]."""
    require(low <= value <= high, f"{key}={value}: must lie between {low} and {high}")
