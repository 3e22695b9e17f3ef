"""One parallel layout against Hugging Face: tiny models of awkward shape, and what each rank of a layout computes.

Ranks go the way of a training run: packer, policy, schedule, optimizer. Gradients are read from Megatron's buffers
after an update, put together as weights are, and so compared under their Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.config import Config, load_config
from megatron_mmrl.models.tiny import TinySizes
from megatron_mmrl.trainer.packing import Packed
from megatron_mmrl.types import MicroBatch, TrainSequence
from tests.dist import policy_case

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
# 60 is no multiple of 8, as the published ViT's 3420; vocabularies lose their last rows, so that no size divides them.
MODELS: dict[str, tuple[TinySizes, bool]] = {
    # Like 3B: tied, fewer key/value heads than most tensor sizes; a ViT with an odd number of heads.
    "tied": (
        TinySizes(hidden=64, num_heads=8, num_kv_heads=2, intermediate=96, vision_hidden=48, vision_heads=3,
                  vision_intermediate=60),
        True,
    ),
    # Like 7B: untied, an odd number of heads per group.
    "untied": (
        TinySizes(hidden=96, num_heads=12, num_kv_heads=4, intermediate=72, vision_intermediate=60),
        False,
    ),
    # An odd number of heads, one of keys and values.
    "odd": (
        TinySizes(hidden=72, num_heads=3, num_kv_heads=1, intermediate=72, vision_intermediate=60),
        False,
    ),
}  # fmt: skip
GRIDS = ([], [[1, 4, 4]], [[1, 4, 12], [1, 10, 6]], [])  # per sequence: text, one image, two of other sizes, text
TEXT_TOKENS = (11, 9, 13, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What Hugging Face says."""

    path: Path
    sequences: list[TrainSequence]
    logits: list[torch.Tensor]  # [L, V] each
    loss: float  # mean cross-entropy of every token but the first of each sequence
    gradients: dict[str, torch.Tensor]  # by original name

    @property
    def grad_norm(self) -> float:
        return float(torch.stack([gradient.norm() for gradient in self.gradients.values()]).norm())


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What one rank found."""

    weights_differ: list[str]
    logit_error: float | None  # max |difference| / max(1, max |logit|); None but on the last stage
    loss: float
    grad_norm: float
    gradient_errors: dict[str, float]  # by original name: max |difference| / max |gradient|
    microbatches: int


def make_reference(name: str, path: Path) -> Path:
    """Write the model ``name`` to ``path``, and what Hugging Face computes to a file there, which is returned."""
    declare_torchvision_ops()
    from transformers import Qwen2_5_VLForConditionalGeneration

    from megatron_mmrl.models.hf_io import to_original, to_scheme
    from megatron_mmrl.models.tiny import make_tiny_checkpoint

    sizes, tied = MODELS[name]
    make_tiny_checkpoint(path, tied=tied, sizes=sizes)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    model.resize_token_embeddings(model.config.text_config.vocab_size - 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases are 0 and norms 1: a wrong one would not show
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(path)
    if name == "odd":  # in transformers' names, the others in the original ones
        tensors = load_file(path / "model.safetensors")
        renamed = {to_scheme(to_original(tensor), "transformers"): value for tensor, value in tensors.items()}
        save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    torch.save(_reference(model, path), path / "reference.pt")
    return path / "reference.pt"


def _reference(model: torch.nn.Module, path: Path) -> Reference:
    from megatron_mmrl.models.hf_io import to_original

    sequences = make_sequences(path)
    logits = [hugging_face_logits(model, sequence) for sequence in sequences]
    count = sum(len(sequence.ids) - 1 for sequence in sequences)
    losses = [
        torch.nn.functional.cross_entropy(out[:-1], torch.from_numpy(sequence.ids)[1:], reduction="sum")
        for out, sequence in zip(logits, sequences, strict=True)
    ]
    loss = torch.stack(losses).sum() / count
    loss.backward()
    return Reference(
        path=path,
        sequences=sequences,
        logits=[out.detach() for out in logits],
        loss=loss.item(),
        gradients={to_original(name): p.grad for name, p in model.named_parameters()},
    )


def hugging_face_logits(model: torch.nn.Module, sequence: TrainSequence) -> torch.Tensor:
    """[L, V] of one sequence, in the model's dtype."""
    ids = torch.from_numpy(sequence.ids)
    vision = {}
    if len(sequence.image_grid_thw):
        pixels = torch.from_numpy(sequence.pixel_values).to(model.dtype)
        vision = {"pixel_values": pixels, "image_grid_thw": torch.from_numpy(sequence.image_grid_thw)}
    types = (ids == model.config.image_token_id).int()[None]
    return model(input_ids=ids[None], mm_token_type_ids=types, **vision).logits[0]


def make_sequences(path: Path) -> list[TrainSequence]:
    """Random text around and between random images; every token but the first is learned from."""
    from megatron_mmrl.models.registry import model_facts

    image_token_id = model_facts(path).image_token_id
    rng = np.random.default_rng(0)
    sequences = []
    for grids, text_tokens in zip(GRIDS, TEXT_TOKENS, strict=True):
        grid = np.array(grids, dtype=np.int64).reshape(-1, 3)
        text = rng.integers(0, 250, text_tokens)
        images = [np.full(g.prod() // 4, image_token_id) for g in grid]
        # Text between the images too: text[:2], image, text[2:4], image, text[4:].
        parts = [part for i, image in enumerate(images) for part in (text[2 * i : 2 * i + 2], image)]
        ids = np.concatenate([*parts, text[2 * len(images) :]])
        sequences.append(
            TrainSequence(
                ids=ids,
                loss_mask=np.arange(len(ids)) > 0,
                advantages=np.zeros(len(ids), np.float32),
                rollout_logprobs=np.zeros(len(ids), np.float32),
                pixel_values=rng.normal(size=(grid.prod(axis=1).sum(), 1176)).astype(np.float32),
                image_grid_thw=grid,
            )
        )
    return sequences


def config_of(path: Path, *overrides: str) -> Config:
    """Micro-batches of at most 3 sequences (packed) or 2 rows (padded), and no clipping of gradients."""
    base = ("parallel.tensor_model_parallel_size=1", "trainer.micro_batch_tokens=96", "trainer.micro_batch_sequences=3",
            "data.max_prompt_tokens=64", "optim.clip_grad=0", "optim.warmup_updates=0")  # fmt: skip
    return load_config(CONFIG, [f"model.path={path}", *base, *overrides])


def compare(file: Path, overrides: Sequence[str]) -> Compared:
    """What this rank finds in the layout of ``overrides``; ``file`` is what ``make_reference`` wrote."""
    from megatron_mmrl.algorithms.supervised import supervised_loss
    from megatron_mmrl.models.hf_io import HFReader
    from megatron_mmrl.parallel.state import shutdown

    reference: Reference = torch.load(file, weights_only=False)  # written by this test
    policy, packer = build(config_of(reference.path, *overrides))
    reader = HFReader(reference.path)
    exported = {name: torch.equal(tensor, reader[name][:]) for name, tensor in policy.weights()}
    assert sorted(exported) == sorted(reader.names)
    packed = packer.pack(reference.sequences)
    logit_error = _logit_error(policy.chunks, packed, reference)
    stats = policy.update(packed.batch, supervised_loss)
    compared = Compared(
        weights_differ=[name for name, equal in exported.items() if not equal],
        logit_error=logit_error,
        loss=stats.loss,
        grad_norm=stats.grad_norm,
        gradient_errors=_gradient_errors(policy.chunks, reference),
        microbatches=len(packed.batch.microbatches),
    )
    shutdown()
    return compared


def build(config: Config):
    """Nothing is banned, temperature 1."""
    return policy_case.build(config, temperature=1.0, banned=(), chunk_tokens=7)


def _logit_error(chunks: list, packed: Packed, reference: Reference) -> float | None:
    """Largest difference / max(1, largest logit of the sequence); None but on the last stage."""
    differences, scale = _logit_differences(chunks, packed, reference)
    return (differences.amax(dim=1) / scale).max().item() if len(scale) else None


def _logit_differences(chunks: list, packed: Packed, reference: Reference) -> tuple[torch.Tensor, torch.Tensor]:
    """|Megatron - Hugging Face in float32| [n, V] of the n real tokens that this rank holds, and the scale [n]."""
    batches = packed.batch.microbatches
    size, vocab = len(batches[0].input_ids), reference.logits[0].shape[-1]
    expected, scale = torch.zeros(size * len(batches), vocab), torch.zeros(size * len(batches))  # scale 0: padding
    numbers = packed.unpack([np.arange(size) + size * i for i in range(len(batches))])
    for index, tokens in numbers.items():
        expected[tokens] = reference.logits[index]
        scale[tokens] = reference.logits[index].abs().max().clamp(min=1)
    outputs = collect_logits(chunks, batches)
    if not outputs:
        return torch.empty(0, vocab), torch.empty(0)
    held = torch.cat([size * i + held_by_this_rank(batch) for i, batch in enumerate(batches)])
    real = scale[held] > 0
    return (torch.cat(outputs).float() - expected[held]).abs()[real], scale[held][real]


def bfloat16_differences(file: Path, overrides: Sequence[str]) -> tuple[float, int, float]:
    """Sum, number and maximum of |Megatron in bfloat16 - Hugging Face in float32| over this rank's logits."""
    from megatron_mmrl.parallel.state import shutdown

    reference: Reference = torch.load(file, weights_only=False)  # written by this test
    policy, packer = build(config_of(reference.path, "model.dtype=bfloat16", *overrides))
    differences, _ = _logit_differences(policy.chunks, packer.pack(reference.sequences), reference)
    shutdown()
    return differences.sum().item(), differences.numel(), differences.max().item() if differences.numel() else 0.0


def held_by_this_rank(batch: MicroBatch) -> torch.Tensor:
    from megatron.core import parallel_state

    from megatron_mmrl.parallel.context import held_tokens

    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return held_tokens(torch.from_numpy(batch.cu_seqlens), rank, size)


def collect_logits(chunks: list, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """[tokens that this rank holds, V] of each micro-batch through the pipeline; empty but on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_attr_wrapped_model

    from megatron_mmrl.trainer.forward import model_inputs

    def step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        return chunk(**model_inputs(next(iterator))), partial(finish, get_attr_wrapped_model(chunk, "logits"))

    def finish(logits: Callable, hidden: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        assert non_loss_data
        return logits(hidden).flatten(0, 1)

    iterators = [iter(batches) for _ in chunks]
    rows = batches[0].num_rows or 1
    with torch.no_grad():
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=len(batches[0].input_ids) // rows,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
        )


def _gradient_errors(chunks: list, reference: Reference) -> dict[str, float]:
    """Of every tensor, from the gradient buffers: each rank of the data group has summed its share of them."""
    from megatron.core import parallel_state

    from megatron_mmrl.reshard.reference import export_hf

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for chunk in chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                share = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, share, group=group)
        for parameter in chunk.module.parameters():
            parameter.data = parameter.main_grad
    gradients = dict(export_hf([chunk.module for chunk in chunks]))
    assert gradients.keys() == reference.gradients.keys()
    return {
        name: ((gradient - reference.gradients[name]).abs().max() / reference.gradients[name].abs().max()).item()
        for name, gradient in gradients.items()
    }
