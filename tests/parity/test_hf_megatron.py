"""Megatron's model equals Hugging Face's in every layout: logits, gradients, and weights there and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.models.registry import model_facts, position_ids_function
from tests.dist.launch import run_ranks

GRIDS = ([], [[1, 4, 4]], [[1, 4, 12], [1, 10, 6]], [])  # per sequence: text, one image, two of other sizes, text
TEXT_TOKENS = (11, 9, 13, 5)
PACKS = ((0, 3), (1, 2))  # two micro-batches: without images, with all three
BATCHES = {"packed": PACKS, "padded": PACKS, "packed, all in one": ((0, 1, 2, 3),), "padded, text only": ((0, 3),)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence_:
    ids: torch.Tensor  # [L]
    positions: torch.Tensor  # [3, L]
    pixels: torch.Tensor  # [N, 1176]
    grids: torch.Tensor  # [I, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What Hugging Face says."""

    name: str
    path: Path
    sequences: list[Sequence_]
    logits: list[torch.Tensor]  # [L, V] each
    gradients: dict[str, torch.Tensor]  # of the summed next-token cross-entropy, by original name


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One file per checkpoint: untied in transformers' names, tied in original names with an odd vocabulary."""
    declare_torchvision_ops()
    from transformers import Qwen2_5_VLForConditionalGeneration

    from megatron_mmrl.models.hf_io import to_original, to_scheme
    from megatron_mmrl.models.tiny import make_tiny_checkpoint

    files = []
    for name, tied in (("untied", False), ("tied", True)):
        path = tmp_path_factory.mktemp(name)
        make_tiny_checkpoint(path, tied=tied)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        if tied:
            model.resize_token_embeddings(model.config.text_config.vocab_size - 1)
            model.save_pretrained(path)
        torch.save(_reference(model, name, path), path / "reference.pt")
        if not tied:
            tensors = load_file(path / "model.safetensors")
            renamed = {to_scheme(to_original(tensor), "transformers"): value for tensor, value in tensors.items()}
            save_file(renamed, path / "model.safetensors")
        files.append(path / "reference.pt")
    return files


def _reference(model: torch.nn.Module, name: str, path: Path) -> Reference:
    from megatron_mmrl.models.hf_io import to_original

    facts = model_facts(path)
    positions_of = position_ids_function(facts)
    sequences, logits = [], []
    generator = torch.Generator().manual_seed(0)
    for grids, text_tokens in zip(GRIDS, TEXT_TOKENS, strict=True):
        grid = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
        ids = torch.randint(0, 250, (text_tokens,), generator=generator)
        images = [torch.full((int(g.prod()) // 4,), facts.image_token_id) for g in grid]
        # Text between the images too: ids[:2], image, ids[2:4], image, ids[4:].
        parts = [part for i, image in enumerate(images) for part in (ids[2 * i : 2 * i + 2], image)]
        ids = torch.cat([*parts, ids[2 * len(images) :]])
        pixels = torch.randn(int(grid.prod(dim=1).sum()), 1176, generator=generator)
        positions = torch.from_numpy(positions_of(ids.numpy(), grid.numpy()))
        sequences.append(Sequence_(ids=ids, positions=positions, pixels=pixels, grids=grid))
        vision = {"pixel_values": pixels, "image_grid_thw": grid} if len(grid) else {}
        types = (ids == facts.image_token_id).int()[None]
        out = model(input_ids=ids[None], mm_token_type_ids=types, **vision).logits[0]
        torch.nn.functional.cross_entropy(out[:-1], ids[1:], reduction="sum").backward()
        logits.append(out.detach())
    gradients = {to_original(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Reference(name=name, path=path, sequences=sequences, logits=logits, gradients=gradients)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "sequence_parallel", "recompute"),
    [
        (1, 1, False, "none"),
        (2, 1, False, "full"),
        (2, 1, True, "selective"),
        (1, 2, False, "none"),
        (2, 2, True, "full"),
    ],
    ids=["tp1", "tp2", "tp2-sp", "pp2", "tp2-sp-pp2"],
)
def test_logits_gradients_and_weights_equal_hugging_face(
    references: list[Path], tensor: int, pipeline: int, sequence_parallel: bool, recompute: str
) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence_parallel,
    )
    results = run_ranks(_rank, tensor * pipeline, references, parallel, recompute)
    for checkpoint in ("untied", "tied"):
        compared = [result[checkpoint] for result in results]
        assert all(result["weights differ"] == [] for result in compared)
        assert all(result["gradients differ"] == {} for result in compared)
        last_stage = [result["logits"] for result in compared if result["logits"]]
        assert len(last_stage) == tensor
        for errors in last_stage:
            assert errors.keys() == BATCHES.keys()
            assert max(errors.values()) <= 1e-5, errors


def _rank(references: Sequence[Path], parallel: ParallelConfig, recompute: str) -> dict[str, dict]:
    from megatron_mmrl.parallel.state import initialize, shutdown

    initialize(parallel, seed=0)
    results = {}
    for file in references:
        reference: Reference = torch.load(file, weights_only=False)  # written by this test
        model = ModelConfig(path=str(reference.path), recompute=recompute)
        results[reference.name] = _compare(reference, parallel, model)
    shutdown()
    return results


def _compare(reference: Reference, parallel: ParallelConfig, model: ModelConfig) -> dict[str, object]:
    from megatron_mmrl.models.hf_io import HFReader
    from megatron_mmrl.models.registry import build_model, load_hf_weights
    from megatron_mmrl.reshard.reference import export_hf

    chunks = build_model(reference.path, parallel=parallel, model=model)
    load_hf_weights(chunks, reference.path)
    reader = HFReader(reference.path)
    exported = [(name, torch.equal(tensor, reader[name][:])) for name, tensor in export_hf(chunks)]
    assert sorted(name for name, _ in exported) == sorted(reader.names)
    return {
        "weights differ": [name for name, equal in exported if not equal],
        "logits": _logit_errors(chunks, reference),
        "gradients differ": _gradient_errors(chunks, reference),
    }


def _logit_errors(chunks: list, reference: Reference) -> dict[str, float]:
    """max |difference| / max(1, max |logit|) of each batch; empty but on the last stage."""
    errors = {}
    for name, packs in BATCHES.items():
        padded = name.startswith("padded")
        batches = [_batch([reference.sequences[i] for i in pack], packs, reference, padded) for pack in packs]
        outputs = run_schedule(chunks, batches, lambda chunk, _, hidden: chunk.logits(hidden), forward_only=True)
        for pack, logits in zip(packs, outputs, strict=bool(outputs)):
            expected = [reference.logits[i] for i in pack]
            got = (
                logits[0] if not padded else torch.cat([row[: len(e)] for row, e in zip(logits, expected, strict=True)])
            )
            differences = [
                (g - e).abs().max() / e.abs().max().clamp(min=1)
                for g, e in zip(got[: sum(map(len, expected))].split([len(e) for e in expected]), expected, strict=True)
            ]
            errors[name] = max(errors.get(name, 0.0), *(d.item() for d in differences))
    return errors


def _gradient_errors(chunks: list, reference: Reference) -> dict[str, float]:
    """Tensors whose gradients differ by more than 1e-5 of the largest; gradients travel as weights do."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_mmrl.reshard.reference import export_hf

    wrapped = [DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    batches = [_batch([reference.sequences[i] for i in pack], PACKS, reference, False) for pack in PACKS]
    run_schedule(wrapped, batches, _loss, forward_only=False)
    finalize_model_grads(wrapped)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad
    gradients = dict(export_hf(chunks))
    assert gradients.keys() == reference.gradients.keys()
    errors = {
        name: ((gradient - reference.gradients[name]).abs().max() / reference.gradients[name].abs().max()).item()
        for name, gradient in gradients.items()
    }
    return {name: error for name, error in errors.items() if not error <= 1e-5}


def _loss(chunk: torch.nn.Module, batch: dict, hidden: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of each next token of each sequence."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    first, end = chunk.vocab_range()
    logits = hidden[0] @ chunk.output_weight().T  # [T, V / tp]
    logits = logits.masked_fill(torch.arange(logits.shape[1]) >= end - first, float("-inf"))
    losses = vocab_parallel_cross_entropy(logits[:-1, None].contiguous(), batch["input_ids"][0, 1:, None])[:, 0]
    bounds = batch["packed_seq_params"].cu_seqlens_q[: batch["num_real"] + 1].tolist()
    return sum(losses[a : b - 1].sum() for a, b in itertools.pairwise(bounds))


def run_schedule(chunks: list, batches: list[dict], read: Callable, *, forward_only: bool) -> list:
    """What ``read(chunk, batch, hidden states)`` gave for each micro-batch; empty but on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Iterator[dict], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        batch = next(iterator)
        inputs = {name: value for name, value in batch.items() if name != "num_real"}
        return chunk(**inputs), partial(finish, getattr(chunk, "module", chunk), batch)

    def finish(chunk: torch.nn.Module, batch: dict, hidden: torch.Tensor, non_loss_data: bool = False) -> object:
        value = read(chunk, batch, hidden)
        return value if non_loss_data else (value, torch.tensor(1), value.detach())

    rows, length = batches[0]["input_ids"].shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches)] * len(chunks) if len(chunks) > 1 else iter(batches),
        model=chunks,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _batch(
    sequences: list[Sequence_], packs: Sequence[Sequence[int]], reference: Reference, padded: bool
) -> dict[str, object]:
    """Model inputs; every micro-batch of a schedule is equally long, a multiple of 8."""
    lengths = [[len(reference.sequences[i].ids) for i in pack] for pack in packs]
    longest = max(max(row) if padded else sum(row) for row in lengths)
    length = longest // 8 * 8 + 8
    rows = [[s] for s in sequences] if padded else [sequences]
    return {
        "input_ids": torch.stack([_pad(torch.cat([s.ids for s in row]), length) for row in rows]),
        "position_ids": torch.stack([_pad(torch.cat([s.positions for s in row], 1), length) for row in rows], dim=1),
        "packed_seq_params": None if padded else _packed([len(s.ids) for s in sequences], length),
        "pixel_values": torch.cat([s.pixels for s in sequences]),
        "image_grid_thw": torch.cat([s.grids for s in sequences]),
        "num_real": len(sequences),
    }


def _pad(x: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, length - x.shape[-1]))


def _packed(lengths: list[int], total: int) -> object:
    from megatron_mmrl.parallel.attention import pack

    return pack(torch.tensor(np.cumsum([0, *lengths, total - sum(lengths)]), dtype=torch.int32), torch.device("cpu"))


def test_positions_equal_hugging_face() -> None:
    """Also with an image at the very beginning and one at the very end; gaps are tokens of text."""
    declare_torchvision_ops()
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    from megatron_mmrl.models.qwen2_5_vl.mrope import position_ids

    with torch.device("meta"):
        small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
        oracle = Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=small, vision_config={"depth": 1}))
    pad = 7
    cases = (([[1, 4, 6], [1, 2, 2]], (0, 3, 0)), ([[1, 6, 4]], (5, 2)), ([[1, 2, 8], [1, 8, 2]], (1, 1, 9)))
    for grids, gaps in cases:
        grid = np.array(grids)
        parts = [np.zeros(gaps[0], dtype=np.int64)]
        for g, gap in zip(grid, gaps[1:], strict=True):
            parts += [np.full(g.prod() // 4, pad), np.zeros(gap, dtype=np.int64)]
        ids = np.concatenate(parts)
        expected, _ = oracle.get_rope_index(
            torch.from_numpy(ids)[None], torch.from_numpy(ids == pad).int()[None], torch.from_numpy(grid)
        )
        np.testing.assert_array_equal(position_ids(ids, grid, image_token_id=pad, merge_size=2), expected[:, 0])
