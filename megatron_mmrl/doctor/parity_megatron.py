"""Megatron's side: every rank scores the sequences, and where they differ records the stages of the worst one.

``python -m megatron_mmrl.doctor.parity_megatron DIR`` is one rank; what it is asked and what it answers are files of
``DIR``, because ranks are processes of their own (one rank alone runs in the caller's).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from megatron_mmrl.cluster.failure import run_rank
from megatron_mmrl.config import Config
from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.config.trainer import TrainerConfig
from megatron_mmrl.doctor.parity_compare import TensorDifference, Trace, kind_of_difference
from megatron_mmrl.doctor.parity_oracle import Dtype, ModelInputs
from megatron_mmrl.doctor.parity_trace import as_array, hooked_chunks, joined_images
from megatron_mmrl.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from torch import nn

    from megatron_mmrl.trainer.packing import Packed
    from megatron_mmrl.types import TrainSequence

Prepare = Callable[[Sequence["nn.Module"]], None]
_PACK_TOKENS = 8192
_REQUEST, _SEQUENCES, _LOG_DIR = "request.json", "sequences.safetensors", "logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What the ranks are to compare."""

    checkpoint: str
    parallel: ParallelConfig
    dtype: Dtype
    tolerance: float
    """The worst sequence is traced when a log-prob is further off than this."""
    sequences: tuple[ModelInputs, ...]
    reference: tuple[NDArray[np.float32], ...]
    """Log-probs [R] of each sequence."""

    def write(self, directory: Path) -> None:
        scalars = {name: getattr(self, name) for name in ("checkpoint", "dtype", "tolerance")}
        prompts = [inputs.num_prompt for inputs in self.sequences]
        arrays = {
            f"{number}.{name}": np.ascontiguousarray(value)
            for number, (inputs, reference) in enumerate(zip(self.sequences, self.reference, strict=True))
            for name, value in (
                ("ids", inputs.ids),
                ("pixel_values", inputs.pixel_values),
                ("image_grid_thw", inputs.image_grid_thw),
                ("reference", reference),
            )
        }
        save_file(arrays, directory / _SEQUENCES)
        text = json.dumps({**scalars, "parallel": asdict(self.parallel), "num_prompt": prompts})
        (directory / _REQUEST).write_text(text)

    @classmethod
    def read(cls, directory: Path) -> ScoreRequest:
        content = json.loads((directory / _REQUEST).read_text())
        arrays = load_file(directory / _SEQUENCES)
        prompts = content.pop("num_prompt")
        fields = ("ids", "pixel_values", "image_grid_thw")
        return cls(
            **{**content, "parallel": ParallelConfig(**content["parallel"])},
            sequences=tuple(
                ModelInputs(num_prompt=prompt, **{name: arrays[f"{number}.{name}"] for name in fields})
                for number, prompt in enumerate(prompts)
            ),
            reference=tuple(arrays[f"{number}.reference"] for number in range(len(prompts))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """What the ranks found."""

    logprobs: tuple[NDArray[np.float32], ...]
    traced: int | None
    """The sequence that was traced; None: all agree."""
    trace: Trace
    wrong: tuple[TensorDifference, ...]
    """Weights that are not the checkpoint's."""
    weights: tuple[str, ...]
    """Names of all of the model's tensors; empty where nothing was traced."""


def run_megatron(request: ScoreRequest, directory: Path) -> ScoreResult:
    """Score in the layout that is asked for: ranks of this machine, or this process where one rank is enough.

    Raises:
        ValueError: the ranks failed; their logs stay in ``directory``.
    """
    request.write(directory)
    world = request.parallel.world_size
    if world == 1:
        score(directory)
    else:
        from megatron_mmrl.cluster.local import run_ranks

        code = run_ranks("megatron_mmrl.doctor.parity_megatron", [str(directory)], world, directory / _LOG_DIR)
        if code:
            raise ValueError(f"the {world} Megatron ranks ended with exit code {code}; see {directory / _LOG_DIR}")
    return read_result(request, directory)


def score(directory: Path, prepare: Prepare | None = None) -> None:
    """One rank: build, load, compare, write.

    Args:
        directory: holds the request.
        prepare: called with the loaded chunks before anything is computed.
    """
    from megatron_mmrl.models.registry import build_model, load_checkpoint, open_checkpoint
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize, shutdown

    request = ScoreRequest.read(directory)
    layout = initialize(request.parallel, seed=0)
    try:
        exchange = Collectives()
        model = ModelConfig(path=request.checkpoint, dtype=request.dtype)
        chunks = build_model(request.checkpoint, parallel=request.parallel, model=model)
        load_checkpoint(chunks, open_checkpoint(request.checkpoint))
        if prepare is not None:
            prepare(chunks)
        packed = _pack(request, layout, exchange.rank)
        mine = packed.unpack(_logprobs(chunks, packed, request))
        gaps: dict[int, float] = {}
        for part in exchange.all_gather(_gaps(request, mine)):
            gaps |= part
        save_file({str(number): values for number, values in mine.items()}, directory / f"scores{exchange.rank}")
        worst = _worst(request, gaps)
        if worst is not None:
            _write_trace(request, directory, chunks, packed, (worst, exchange.rank))
        exchange.barrier()
    finally:
        shutdown()


def read_result(request: ScoreRequest, directory: Path) -> ScoreResult:
    """Put together what the ranks wrote."""
    layout = ParallelLayout.from_config(request.parallel)
    scores: dict[int, NDArray[np.float32]] = {}
    for rank in range(layout.world_size):
        arrays = load_file(directory / f"scores{rank}")
        scores |= {int(name): values[request.sequences[int(name)].num_prompt :] for name, values in arrays.items()}
    findings = {
        rank: json.loads((directory / f"findings{rank}.json").read_text())
        for rank in range(layout.world_size)
        if (directory / f"findings{rank}.json").exists()
    }
    wrong = {
        tuple(names): TensorDifference(names=tuple(names), kind=kind)
        for found in findings.values()
        for names, kind in found["wrong"]
    }
    return ScoreResult(
        logprobs=tuple(scores[number] for number in range(len(request.sequences))),
        traced=next((found["traced"] for found in findings.values()), None),
        trace=_read_trace(request, layout, directory, findings),
        wrong=tuple(sorted(wrong.values(), key=lambda weight: weight.names)),
        weights=tuple(sorted({name for found in findings.values() for name in found["weights"]})),
    )


def _pack(request: ScoreRequest, layout: ParallelLayout, rank: int) -> Packed:
    from megatron_mmrl.build import packer_for
    from megatron_mmrl.models.registry import model_facts

    longest = max(len(inputs.ids) for inputs in request.sequences)
    config = Config(
        model=ModelConfig(path=request.checkpoint, dtype=request.dtype),
        parallel=request.parallel,
        data=DataConfig(max_prompt_tokens=longest),
        trainer=TrainerConfig(micro_batch_tokens=max(_PACK_TOKENS, 2 * longest)),  # several sequences to a pack
    )
    # Padding is never read: any token that is no image will do.
    pad_id = model_facts(request.checkpoint).eos_token_ids[0]
    return packer_for(config, layout, pad_id, rank).pack([_train_sequence(inputs) for inputs in request.sequences])


def _train_sequence(inputs: ModelInputs) -> TrainSequence:
    from megatron_mmrl.types import TrainSequence

    zeros = np.zeros(len(inputs.ids), np.float32)
    return TrainSequence(
        ids=inputs.ids,
        loss_mask=np.arange(len(inputs.ids)) >= inputs.num_prompt,
        advantages=zeros,
        rollout_logprobs=zeros,
        pixel_values=inputs.pixel_values,
        image_grid_thw=inputs.image_grid_thw,
    )


@torch.no_grad()
def _logprobs(chunks: Sequence[nn.Module], packed: Packed, request: ScoreRequest) -> list[NDArray[np.float32]]:
    """Of each micro-batch, [T], on every rank of the replica; at temperature 1 and without a mask."""
    from megatron_mmrl.models.registry import model_facts
    from megatron_mmrl.parallel.device import device
    from megatron_mmrl.trainer.forward import TokenDistribution
    from megatron_mmrl.trainer.policy import batch_logprobs

    distribution = TokenDistribution(
        temperature=1.0,
        banned=torch.empty(0, dtype=torch.int64, device=device()),
        vocab_size=model_facts(request.checkpoint).vocab_size,
        chunk_tokens=TrainerConfig().logprob_chunk_tokens,
    )
    return batch_logprobs(chunks, packed.batch, distribution)


def _gaps(request: ScoreRequest, mine: Mapping[int, NDArray[np.float32]]) -> dict[int, float]:
    """Largest |difference| from the reference of each sequence; NaN counts as infinite."""
    gaps = {}
    for number, values in mine.items():
        gap = np.abs(values[request.sequences[number].num_prompt :] - request.reference[number])
        gaps[number] = float(np.where(np.isnan(gap), np.inf, gap).max())
    return gaps


def _worst(request: ScoreRequest, gaps: Mapping[int, float]) -> int | None:
    """The sequence that differs most, one with images if any of those does: it passes through every stage."""
    differing = [number for number, gap in gaps.items() if gap > request.tolerance]
    with_images = [number for number in differing if request.sequences[number].images]
    return max(with_images or differing, key=lambda number: gaps[number], default=None)


def _write_trace(
    request: ScoreRequest, directory: Path, chunks: Sequence[nn.Module], packed: Packed, worst: tuple[int, int]
) -> None:
    """Run all micro-batches again, recording the one with the worst sequence; then compare this rank's weights.

    Args:
        worst: number of the sequence, and this rank.
    """
    number, rank = worst
    places = [
        (j, bin_.index(number)) for j, bin_ in enumerate(packed.plan.microbatches[packed.replica]) if number in bin_
    ]
    micro_batch, slot = places[0] if places else (-1, -1)  # another replica has it: nothing is recorded
    with hooked_chunks(chunks, micro_batch, request.sequences[number].images) as recorder:
        _logprobs(chunks, packed, request)
    finding = {"traced": number, "slot": slot, "wrong": [], "weights": []}
    if places:
        bounds = packed.batch.microbatches[micro_batch].cu_seqlens
        save_file({"bounds": bounds.astype(np.int64), **_contiguous(recorder.values)}, directory / f"trace{rank}")
    for names, kind in _compare_weights(chunks, request):
        finding["weights"] += names
        if kind is not None:
            finding["wrong"].append((names, kind))
    (directory / f"findings{rank}.json").write_text(json.dumps(finding))


def _contiguous(values: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    return {stage: np.ascontiguousarray(value) for stage, value in values.items()}


@torch.no_grad()
def _compare_weights(
    chunks: Sequence[nn.Module], request: ScoreRequest
) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Names of the tensors behind each weight of this rank, and how it differs from its part of the checkpoint."""
    from megatron.core import parallel_state

    from megatron_mmrl.models.hf_io import HFReader

    reader = HFReader(Path(request.checkpoint))
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for chunk in chunks:
        table = chunk.weight_table()
        for name, parameter in chunk.named_parameters():
            entry = table[name]
            expected = entry.rule.split([reader[hf_name] for hf_name in entry.hf_names], rank, size)
            yield entry.hf_names, kind_of_difference(as_array(parameter), as_array(expected.to(parameter.dtype)))


def _read_trace(
    request: ScoreRequest, layout: ParallelLayout, directory: Path, findings: Mapping[int, Mapping[str, int]]
) -> Trace:
    """Rows of all ranks at their places in the sequence."""
    from megatron_mmrl.parallel.context import held_tokens

    parts: dict[str, list[tuple[int, NDArray[np.float32]]]] = {}
    images: dict[str, NDArray[np.float32]] = {}
    bounds, span, num_images = None, slice(0), 0
    for rank in range(layout.world_size):
        if not (directory / f"trace{rank}").exists():
            continue
        arrays = load_file(directory / f"trace{rank}")
        bounds, slot = torch.from_numpy(arrays.pop("bounds")), findings[rank]["slot"]
        inputs = request.sequences[findings[rank]["traced"]]
        span = slice(int(bounds[slot]), int(bounds[slot]) + len(inputs.ids))
        num_images = len(inputs.image_grid_thw)
        for stage, value in arrays.items():
            if "@" in stage:
                images[stage] = value
            else:
                parts.setdefault(stage, []).append((rank, value))
    if bounds is None:
        return {}
    held = [held_tokens(bounds, rank, layout.context).numpy() for rank in range(layout.context)]
    text = {stage: _join_rows(ranks, layout, held)[span] for stage, ranks in parts.items()}
    return {**joined_images(images, num_images), **text}


def _join_rows(
    ranks: Sequence[tuple[int, NDArray[np.float32]]], layout: ParallelLayout, held: Sequence[NDArray[np.int64]]
) -> NDArray[np.float32]:
    """One stage's rows in the order of the pack: tensor ranks hold them one after the other (sequence parallelism) or
    all of them each, context ranks those that ``held`` names."""
    total = sum(len(tokens) for tokens in held)
    if len(ranks[0][1]) == total:  # whole on every rank
        return ranks[0][1]
    full = np.full((total, ranks[0][1].shape[1]), np.nan, np.float32)
    for context, tokens in enumerate(held):
        shares = [rows for rank, rows in ranks if layout.coordinates(rank).context == context]
        full[tokens] = shares[0] if len(shares[0]) == len(tokens) else np.concatenate(shares)
    return full


def main() -> int:
    """One rank of several."""
    score(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    run_rank(main)
