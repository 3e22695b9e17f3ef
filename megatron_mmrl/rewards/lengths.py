"""What a response's length in tokens is worth, and what repeating itself costs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mmrl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftOverlong:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13), from 0 down to -1.

    0 up to max_tokens - cache_tokens, then falling in a line, -1 from max_tokens on.
    """

    max_tokens: int
    cache_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens:
            raise ValueError(
                f"cache_tokens={self.cache_tokens} must be at least 1 and at most max_tokens={self.max_tokens}"
            )

    def __call__(self, prompt: Prompt, response_text: str, *, response_tokens: int) -> float:
        """See the class."""
        free = self.max_tokens - self.cache_tokens
        return max(-1.0, min(0.0, (free - response_tokens) / self.cache_tokens))

    at_once = __call__


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How much of its room a response takes: 0 up to ``min_tokens``, 1 from ``max_tokens`` on, a line in between.

    A negative weight makes it a price of long answers, a positive one a premium on them.
    """

    max_tokens: int
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_tokens < self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at least 0 and below max_tokens={self.max_tokens}")

    def __call__(self, prompt: Prompt, response_text: str, *, response_tokens: int) -> float:
        """See the class."""
        share = (response_tokens - self.min_tokens) / (self.max_tokens - self.min_tokens)
        return max(0.0, min(1.0, share))

    at_once = __call__


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """``max_penalty`` times the share of n-grams of words that stood before (arXiv 2502.03373, appendix), case ignored.

    0 where no n-gram comes twice, and for texts shorter than one.
    """

    ngram: int = 3
    max_penalty: float = -1.0

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram={self.ngram}: must be at least 1")
        if self.max_penalty > 0:
            raise ValueError(f"max_penalty={self.max_penalty}: a penalty is at most 0")

    def __call__(self, prompt: Prompt, response_text: str) -> float:
        """See the class."""
        words = response_text.lower().split()
        ngrams = list(zip(*(words[start:] for start in range(self.ngram)), strict=False))
        if not ngrams:
            return 0.0
        return self.max_penalty * (1.0 - len(set(ngrams)) / len(ngrams))

    at_once = __call__
