"""Encoded prompts without end: rows are visited in seeded order, bad ones set aside, the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_mmrl import pulse
from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.dataset import PromptDataset
from megatron_mmrl.data.errors import BadPromptError, BadRowError, PromptTooLongError
from megatron_mmrl.data.image_processor import Exchange
from megatron_mmrl.data.processor import Processor
from megatron_mmrl.data.quarantine import Quarantine
from megatron_mmrl.data.stream import PromptStream
from megatron_mmrl.types import EncodedPrompt, Prompt

Keep = Callable[[Prompt], str | None]
"""Says why a prompt is to be left out (its answer cannot be parsed, ...), or None to keep it."""

_CHUNK = 64  # rows encoded at once where all rows are read


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a row is not used."""

    kind: Literal["bad", "too_long", "dropped"]
    reason: str


class PromptSource:
    """``next(n)`` gives n good prompts; ``all()`` gives every good one once, in file order.

    With ``exchange`` every rank must make the same calls: a row that any rank cannot read is left out on all of them,
    and images are processed by one rank each. A row is judged once; later epochs pass over it in silence.

    Args:
        quarantine: where bad rows go; a rank other than 0 counts but does not write.
        keep: rows for which it gives a reason are dropped and counted, but are not bad.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        processor: Processor,
        stream: PromptStream,
        quarantine: Quarantine,
        *,
        keep: Keep | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._dataset, self._processor, self._stream = dataset, processor, stream
        self._quarantine, self._keep, self._exchange = quarantine, keep, exchange
        self._kept: set[int] = set()
        self._refused: dict[int, Refusal] = {}

    @property
    def num_prompts(self) -> int:
        """Rows of the data files, good and bad."""
        return len(self._dataset)

    @property
    def refused(self) -> Mapping[str, Refusal]:
        """``<file>:<row>`` -> why it is not used, of the rows met so far."""
        return {"{}:{}".format(*self._dataset.locate(row)): refusal for row, refusal in self._refused.items()}

    def next(self, n: int) -> list[EncodedPrompt]:
        """The next ``n`` good prompts. Raises TooManyBadRowsError, or ValueError when no row can be used."""
        encoded: list[EncodedPrompt] = []
        while len(encoded) < n:
            encoded += self._encode(self._stream.next(n - len(encoded)))
            if len(self._refused) == self.num_prompts:
                raise ValueError(f"none of the {self.num_prompts} prompts can be used: {self._summary()}")
        return encoded

    def all(self, limit: int | None = None) -> list[EncodedPrompt]:
        """Every good prompt in file order, or the first ``limit``; the stream does not move."""
        return [prompt for chunk in self.chunks(_CHUNK, limit) for prompt in chunk]

    def chunks(self, size: int, limit: int | None = None) -> Iterator[list[EncodedPrompt]]:
        """``all(limit)`` in lists of at most ``size``, each encoded when it is asked for."""
        wanted = self.num_prompts if limit is None else limit
        for start in range(0, self.num_prompts, size):
            if wanted <= 0:
                return
            encoded = self._encode(range(start, min(start + size, self.num_prompts)))[:wanted]
            wanted -= len(encoded)
            yield encoded

    def counters(self) -> dict[str, float]:
        """Passes over the data and rows set aside, by kind."""
        kinds = Counter(refusal.kind for refusal in self._refused.values())
        return {
            "data/epoch": self._stream.epoch,
            "data/bad_rows": float(kinds["bad"]),
            "data/too_long": float(kinds["too_long"]),
            "data/dropped": float(kinds["dropped"]),
        }

    def state_dict(self) -> dict[str, Any]:
        """Position and refused rows, as JSON."""
        refused = [[row, refusal.kind, refusal.reason] for row, refusal in self._refused.items()]
        return {"stream": self._stream.state_dict(), "quarantine": self._quarantine.state_dict(), "refused": refused}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken. Raises ValueError when it was taken over other data."""
        self._stream.load_state_dict(state["stream"])
        self._quarantine.load_state_dict(state["quarantine"])
        self._refused = {row: Refusal(kind=kind, reason=reason) for row, kind, reason in state["refused"]}

    def _encode(self, rows: Sequence[int]) -> list[EncodedPrompt]:
        rows = [row for row in rows if row not in self._refused]
        prompts = self._read(rows)
        usable = [row for row in rows if row in prompts]
        images = [image for row in usable for image in prompts[row].images]
        outcomes = self._processor.images.process_all(images, self._exchange)
        encoded = []
        for row in usable:
            pulse.beat()
            try:
                encoded.append(self._processor.encode(prompts[row], outcomes))
            except BadPromptError as error:
                self._refuse(row, Refusal(kind="bad", reason=error.reason))
            except PromptTooLongError as error:
                self._refuse(row, Refusal(kind="too_long", reason=error.reason))
        self._quarantine.check()
        return encoded

    def _read(self, rows: Sequence[int]) -> dict[int, Prompt]:
        """The rows that every rank could read and that are to be kept."""
        prompts: dict[int, Prompt] = {}
        refused: dict[int, Refusal] = {}
        for row in rows:
            pulse.beat()
            try:
                prompts[row] = self._dataset.prompt(row)
            except BadRowError as error:
                refused[row] = Refusal(kind="bad", reason=str(error))
        refused |= self._dropped(prompts)
        for part in self._exchange.all_gather(refused) if self._exchange else [refused]:
            for row, refusal in sorted(part.items()):
                self._refuse(row, refusal)
        self._kept |= prompts.keys() - self._refused.keys()
        return {row: prompt for row, prompt in prompts.items() if row not in self._refused}

    def _dropped(self, prompts: Mapping[int, Prompt]) -> dict[int, Refusal]:
        """What ``keep`` says of the rows not judged before; each rank asks about its share."""
        if self._keep is None:
            return {}
        fresh = [row for row in prompts if row not in self._kept]
        mine = fresh[self._exchange.rank :: self._exchange.world_size] if self._exchange else fresh
        reasons = {row: self._keep(prompts[row]) for row in mine}
        return {row: Refusal(kind="dropped", reason=reason) for row, reason in reasons.items() if reason is not None}

    def _refuse(self, row: int, refusal: Refusal) -> None:
        if row in self._refused:
            return
        self._refused[row] = refusal
        if refusal.kind == "bad":
            self._quarantine.add(*self._dataset.locate(row), refusal.reason)

    def _summary(self) -> str:
        row, refusal = next(iter(self._refused.items()))
        kinds = Counter(refusal.kind for refusal in self._refused.values())
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        return f"{counts}; the first is {self._dataset.locate(row)}: {refusal.reason}"


def prompt_source(
    files: Sequence[str],
    config: DataConfig,
    processor: Processor,
    *,
    seed: int,
    quarantine_path: Path,
    keep: Keep | None = None,
    exchange: Exchange | None = None,
) -> PromptSource:
    """Open data files as a PromptSource; rank 0 (or the only rank) writes ``quarantine_path``.

    Raises:
        ValueError: no files, a file is missing, not parquet or empty, unknown ``data.format`` or ``data.template``.
    """
    dataset = PromptDataset(files, config)
    stream = PromptStream(len(dataset), seed=seed, shuffle=config.shuffle, fingerprint=dataset.fingerprint)
    writes = exchange is None or exchange.rank == 0
    quarantine = Quarantine(
        quarantine_path if writes else None, max_bad_fraction=config.max_bad_fraction, total_rows=len(dataset)
    )
    return PromptSource(dataset, processor, stream, quarantine, keep=keep, exchange=exchange)
