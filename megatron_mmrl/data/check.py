"""What is in data files, and what is wrong with them: every row read and every picture decoded, nothing written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.errors import BadImageError, BadPromptError, BadRowError
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.image_processor import fitted_size
from megatron_mmrl.data.images import open_image, pixel_hash
from megatron_mmrl.data.parts import row_reader
from megatron_mmrl.data.raw import Span, plan_spans, read_span
from megatron_mmrl.data.schema import question_of
from megatron_mmrl.data.split import question_key
from megatron_mmrl.data.template import template_of
from megatron_mmrl.data.workers import ordered_map
from megatron_mmrl.types import Prompt

Kind = Literal["bad_row", "bad_image", "bad_prompt", "too_long", "duplicate", "unparsable_answer"]
CountTokens = Callable[[Prompt, Sequence[tuple[int, int]]], int]
"""(prompt without images, their widths and heights) -> tokens. Raises BadPromptError, BadImageError."""
Parsable = Callable[[Sequence[Prompt]], Sequence[bool]]
QWEN_FACTOR = 28  # pixels a side of one image token of Qwen2-VL and Qwen2.5-VL


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something wrong with one row."""

    id: str  # "<file name>:<row>"
    kind: Kind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Least, mean, median, 95th percentile and greatest of some numbers."""

    min: float
    mean: float
    p50: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of nothing."""
        if not values:
            return None
        low, middle, high = np.percentile(values, [0, 50, 95]).tolist()
        return cls(min=low, mean=round(float(np.mean(values)), 3), p50=middle, p95=high, max=float(max(values)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the files hold. Sizes are of the good rows."""

    rows: int
    images: int
    sources: dict[str, int]
    width_pixels: Spread | None
    height_pixels: Spread | None
    image_tokens: Spread | None
    """Per image, at data.min_pixels and data.max_pixels."""
    prompt_chars: Spread | None
    prompt_tokens: Spread | None
    """Images included; None where no model was given."""
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Findings by kind."""
        return dict(Counter(finding.kind for finding in self.findings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One row as a process saw it: a prompt without its images, or what is wrong."""

    id: str
    prompt: Prompt | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    keys: tuple[int, ...] = ()  # question, then images
    finding: Finding | None = None


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What is counted as rows come by."""

    config: DataConfig
    count_tokens: CountTokens | None
    rows: int = 0
    findings: list[Finding] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    prompt_chars: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    first_with: dict[tuple[int, ...], tuple[str, str]] = field(default_factory=dict)  # keys -> (id, answer)

    def add(self, seen: Seen) -> None:
        """Count one row; what is wrong with it becomes a finding."""
        self.rows += 1
        if seen.prompt is None:
            self.findings += [] if seen.finding is None else [seen.finding]
            return
        try:
            self._measure(seen.prompt, seen.sizes)
        except BadImageError as error:
            self.found(seen.id, "bad_image", str(error))
            return
        except BadPromptError as error:
            self.found(seen.id, "bad_prompt", error.reason)
            return
        self.sources[seen.prompt.source] += 1
        first, answer = self.first_with.setdefault(seen.keys, (seen.id, seen.prompt.answer))
        if first != seen.id:
            how = "" if answer == seen.prompt.answer else f", but the answer {seen.prompt.answer!r} is {answer!r} there"
            self.found(seen.id, "duplicate", f"the same question and images as {first}{how}")

    def found(self, row_id: str, kind: Kind, reason: str) -> None:
        self.findings.append(Finding(id=row_id, kind=kind, reason=reason))

    def _measure(self, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> None:
        limits = {"min_pixels": self.config.min_pixels, "max_pixels": self.config.max_pixels}
        fitted = [fitted_size(*size, factor=QWEN_FACTOR, **limits) for size in sizes]
        if self.count_tokens is not None:
            tokens = self.count_tokens(prompt, sizes)
            self.prompt_tokens.append(tokens)
            if tokens > (most := self.config.max_prompt_tokens):
                self.found(prompt.id, "too_long", f"{tokens} tokens, more than data.max_prompt_tokens={most}")
        self.sizes += sizes
        self.image_tokens += [width * height // QWEN_FACTOR**2 for width, height in fitted]
        self.prompt_chars.append(sum(len(message.text) for message in prompt.messages))


def check(
    files: Sequence[str],
    config: DataConfig,
    *,
    count_tokens: CountTokens | None,
    parsable: Parsable,
    jobs: int,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every row of ``files`` as ``config`` says.

    Args:
        files: parquet, arrow, jsonl, json or csv.
        config: format, template, image root, pixel limits, longest prompt.
        count_tokens: of the model; None: prompts are measured in characters alone.
        parsable: whether the rewards can compare with the gold answers of some prompts.
        jobs: processes that read and decode.
        progress: called with (rows read since the last call, rows in all).

    Raises:
        ValueError: unknown format or template, files that cannot be read or have no rows.
    """
    if config.format not in FORMATS:
        raise ValueError(f"data.format={config.format!r} is not known; use one of {', '.join(FORMATS)}")
    tally = _Tally(config=config, count_tokens=count_tokens)
    template = template_of(config)
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: must be at least 1")
    spans = plan_spans(files, jobs)
    total = sum(span.num_rows for span in spans)
    if not total:
        raise ValueError("the data files have no rows")
    with closing(ordered_map(partial(look_at_span, config), spans, jobs)) as results:
        for rows in results:
            rows = [row if row.prompt is None else replace(row, prompt=template.apply(row.prompt)) for row in rows]
            for row in rows:
                tally.add(row)
            prompts = [row.prompt for row in rows if row.prompt is not None]
            for prompt, good in zip(prompts, parsable(prompts), strict=True):
                if not good:
                    tally.found(prompt.id, "unparsable_answer", f"the gold answer {prompt.answer!r} cannot be parsed")
            if progress is not None:
                progress(len(rows), total)
    return _report(tally)


def look_at_span(config: DataConfig, span: Span) -> list[Seen]:
    """The rows of a span, in a process of its own."""
    read = row_reader(config.format, config.image_root, None)
    seen = []
    for row, columns in read_span(span):
        row_id = f"{span.name}:{row}"
        kind: Kind = "bad_row"
        try:
            if isinstance(columns, BadRowError):
                raise columns
            prompt = read(columns, row_id)
            kind = "bad_image"
            looks = [_look(data, config.max_decoded_pixels) for data in prompt.images]
        except (BadRowError, BadImageError) as error:
            seen.append(Seen(id=row_id, finding=Finding(id=row_id, kind=kind, reason=str(error))))
            continue
        keys = (question_key(question_of(prompt)), *(key for _, _, key in looks))
        sizes = tuple((width, height) for width, height, _ in looks)
        seen.append(Seen(id=row_id, prompt=replace(prompt, images=()), sizes=sizes, keys=keys))
    return seen


def _look(data: bytes, max_decoded_pixels: int) -> tuple[int, int, int]:
    """Width, height and pixel_hash. Raises BadImageError."""
    image = open_image(data, max_decoded_pixels)
    return image.width, image.height, pixel_hash(image)


def _report(tally: _Tally) -> Report:
    return Report(
        rows=tally.rows,
        images=len(tally.sizes),
        sources=dict(tally.sources),
        width_pixels=Spread.of([width for width, _ in tally.sizes]),
        height_pixels=Spread.of([height for _, height in tally.sizes]),
        image_tokens=Spread.of(tally.image_tokens),
        prompt_chars=Spread.of(tally.prompt_chars),
        prompt_tokens=Spread.of(tally.prompt_tokens),
        findings=tuple(tally.findings),
    )
