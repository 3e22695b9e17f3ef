"""Do Hugging Face, Megatron and SGLang read a checkpoint alike? On real samples, with and without their images.

Hugging Face's processor and model are the oracle. Each side is loaded, asked and let go before the next, so that one
copy of the model is in memory at a time; where Megatron differs, Hugging Face is loaded again and compared by stage.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.data.processor import Processor
from megatron_mmrl.doctor.parity_compare import Difference, difference, explain_trace, stage_errors
from megatron_mmrl.doctor.parity_engine import EngineProbe, explain_engine
from megatron_mmrl.doctor.parity_megatron import ScoreRequest, ScoreResult, run_megatron
from megatron_mmrl.doctor.parity_oracle import (
    Dtype,
    PixelLimits,
    ReferenceProcessor,
    reference_logprobs,
    reference_trace,
)
from megatron_mmrl.doctor.parity_samples import AS_IS, BLANK, Variant, explain_inputs, read_samples

HF, MEGATRON, SGLANG = "Hugging Face", "Megatron", "SGLang"
_MAX_PROMPT_TOKENS = 16_384
_MIN_PIXELS = 56 * 56  # where only the upper limit is given
Logprobs = Sequence[NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """What to compare."""

    checkpoint: Path
    data: Path  # parquet
    samples: int = 8
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tolerance: float = 1e-4
    """Nats that a token log-prob may be off (in bfloat16: or twice what Hugging Face's own rounding makes of it), and
    relative error of a stage."""
    dtype: Dtype = "float32"
    engine_tensor: int | None = 1
    """Tensor-parallel size of the engine; None: no engine."""
    processor: Path | None = None
    """Directory whose tokenizer and image processor training uses; None: the checkpoint."""
    max_pixels: int | None = None
    """Pixel limit for all sides; None: those of the two processors."""
    image_root: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the three readers."""

    name: str
    change: float | None
    """By how much blank images move a log-prob at most, nats; None: no sample has an image."""
    sees: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence: the difference of each pair of sides, ``("Megatron - Hugging Face", ...)``."""

    sample: str
    way: str
    tokens: int
    differences: Mapping[str, Difference]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """What was found."""

    rows: tuple[Row, ...]
    totals: Mapping[str, Difference]
    sides: tuple[Side, ...]
    allowed: float
    """Nats."""
    skipped: tuple[str, ...]
    causes: tuple[str, ...]
    """What differs and why, the first cause first; empty: all agree."""

    @property
    def agree(self) -> bool:
        return not self.causes


Score = Callable[[ScoreRequest, Path], ScoreResult]
OpenEngine = Callable[[Processor, Path], AbstractContextManager[EngineProbe]]


def run_parity(
    options: ParityOptions,
    *,
    megatron: Score = run_megatron,
    engine: OpenEngine | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Compare.

    Args:
        megatron: scores in a directory of its own.
        engine: opens the engine as a context manager; None: one is started with the checkpoint's weights.
        note: told what begins.

    Raises:
        ValueError: the checkpoint, the data or the layout cannot be used, or a side failed.
        EngineError: the engine failed.
    """
    limits = None if options.max_pixels is None else PixelLimits(min=_MIN_PIXELS, max=options.max_pixels)
    reference = ReferenceProcessor(options.checkpoint, limits)
    data = _data_config(options, limits)
    ours = Processor(str(options.processor or options.checkpoint), data)
    samples = read_samples(options.data, options.samples, config=data, ours=ours, reference=reference)
    variants = samples.variants
    note(f"{HF}: {len(variants)} sequences")
    oracle = reference_logprobs(options.checkpoint, "float32", [variant.reference for variant in variants])
    allowed = _allowed(options, variants, oracle)
    other_inputs = explain_inputs(variants, ours.images.settings(), reference.settings())
    causes = {"processor": other_inputs}
    logprobs: dict[str, Logprobs] = {HF: oracle}
    with _scratch() as directory:
        request = ScoreRequest(
            checkpoint=str(options.checkpoint),
            parallel=options.parallel,
            dtype=options.dtype,
            tolerance=allowed,
            sequences=tuple(variant.ours for variant in variants),
            reference=tuple(oracle),
        )
        note(f"{MEGATRON}: {options.parallel.world_size} rank(s)")
        result = megatron(request, directory)
        logprobs[MEGATRON] = result.logprobs
        if other_inputs is None:  # else it explains all that follows
            causes[MEGATRON] = _explain_megatron(options, request, result, variants)
        if options.engine_tensor is not None:
            note(f"{SGLANG}: tensor-parallel size {options.engine_tensor}")
            with (engine or _start_engine(options))(ours, directory) as probe:
                scores = probe.score(variants)
                logprobs[SGLANG] = scores.logprobs
                if other_inputs is None:
                    causes[SGLANG] = explain_engine(probe, scores, variants, oracle, allowed)
    return ParityReport(
        rows=_rows(variants, logprobs),
        totals=_pairs(logprobs, range(len(variants))),
        sides=tuple(_side(name, values, variants, allowed) for name, values in logprobs.items()),
        allowed=allowed,
        skipped=samples.skipped,
        causes=tuple(f"{name}: {cause}" for name, cause in causes.items() if cause is not None),
    )


def _data_config(options: ParityOptions, limits: PixelLimits | None) -> DataConfig:
    """What our processor does; its limits are those of its own directory unless they are given."""
    limits = limits or ReferenceProcessor(options.processor or options.checkpoint, None).limits
    return DataConfig(
        min_pixels=limits.min,
        max_pixels=limits.max,
        max_prompt_tokens=_MAX_PROMPT_TOKENS,
        image_root=options.image_root,
    )


def _allowed(options: ParityOptions, variants: Sequence[Variant], oracle: Logprobs) -> float:
    """The tolerance; in bfloat16 at least twice what rounding does to Hugging Face's own log-probs."""
    if options.dtype == "float32":
        return options.tolerance
    rounded = reference_logprobs(options.checkpoint, options.dtype, [variant.reference for variant in variants])
    return max(options.tolerance, 2 * difference(rounded, oracle).max)


def _explain_megatron(
    options: ParityOptions, request: ScoreRequest, result: ScoreResult, variants: Sequence[Variant]
) -> str | None:
    if result.traced is None:
        return None
    variant = variants[result.traced]
    reference = reference_trace(options.checkpoint, "float32", variant.reference)
    rounded = (
        reference
        if options.dtype == "float32"
        else reference_trace(options.checkpoint, options.dtype, variant.reference)
    )
    errors = stage_errors(result.trace, reference, rounded, options.tolerance)
    gap = difference([result.logprobs[result.traced]], [request.reference[result.traced]]).max
    return f"{variant.name} differs by {gap:.2g} nats; {explain_trace(errors, result.wrong, result.weights)}"


def _start_engine(options: ParityOptions) -> OpenEngine:
    @contextmanager
    def start(processor: Processor, directory: Path) -> Iterator[EngineProbe]:
        probe = EngineProbe(
            options.checkpoint,
            processor,
            tensor_parallel=options.engine_tensor or 1,
            dtype=options.dtype,
            directory=directory,
        )
        with probe:
            probe.load(probe.tensors())
            yield probe

    return start


def _pairs(logprobs: Mapping[str, Logprobs], numbers: Sequence[int]) -> dict[str, Difference]:
    """``"Megatron - Hugging Face"`` and so on -> difference over the sequences ``numbers``."""
    names = list(logprobs)
    return {
        f"{left} - {right}": difference(
            [logprobs[left][number] for number in numbers], [logprobs[right][number] for number in numbers]
        )
        for index, right in enumerate(names)
        for left in names[index + 1 :]
    }


def _rows(variants: Sequence[Variant], logprobs: Mapping[str, Logprobs]) -> tuple[Row, ...]:
    return tuple(
        Row(
            sample=variant.sample,
            way=variant.way,
            tokens=len(variant.response),
            differences=_pairs(logprobs, [number]),
        )
        for number, variant in enumerate(variants)
    )


def _side(name: str, logprobs: Logprobs, variants: Sequence[Variant], allowed: float) -> Side:
    """Whether blank images of the same size make another answer likely."""
    ways = {
        way: {variant.sample: values for variant, values in zip(variants, logprobs, strict=True) if variant.way == way}
        for way in (AS_IS, BLANK)
    }
    blank = ways[BLANK]
    if not blank:
        return Side(name=name, change=None, sees=None)
    change = difference([ways[AS_IS][sample] for sample in blank], list(blank.values())).max
    return Side(name=name, change=change, sees=change > allowed)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A directory that is left behind, for its logs, when something fails."""
    directory = Path(tempfile.mkdtemp(prefix="mmrl-parity-"))
    yield directory
    shutil.rmtree(directory)
