"""What can be wrong with the data, as exceptions that name it."""

from __future__ import annotations


class BadRowError(ValueError):
    """A row of a data file cannot become a prompt; the message says what is wrong with it."""


class BadImageError(ValueError):
    """The bytes are not an image that may be decoded."""


class _PromptError(ValueError):
    def __init__(self, prompt_id: str, reason: str) -> None:
        super().__init__(f"prompt {prompt_id}: {reason}")
        self.prompt_id, self.reason = prompt_id, reason


class BadPromptError(_PromptError):
    """A prompt that was read cannot be encoded: broken image, stray special token, pads that disagree with grids."""


class PromptTooLongError(_PromptError):
    """A prompt has more tokens than ``data.max_prompt_tokens``; it is dropped and counted, never cut."""


class TooManyBadRowsError(RuntimeError):
    """More rows are bad than ``data.max_bad_fraction`` allows."""
