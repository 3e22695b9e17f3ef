"""A converted checkpoint loads in any layout: into a plain GPTModel by Megatron's own code, and into our trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.models.hf_io import to_original
from megatron_mmrl.parallel.sharding import padded_vocab_size
from tests.dist.launch import run_ranks

IDS = [[5, 17, 200, 3, 9, 250, 8, 1, 77, 120, 30, 2]]


def nothing(what: str, num_bytes: int) -> None:
    """No progress is shown."""


@pytest.fixture(scope="module", params=["untied", "tied"])
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face checkpoint whose vocabulary no tensor-parallel size divides, and its conversion."""
    from megatron_mmrl.checkpoint.convert.hf_to_megatron import hf_to_megatron
    from megatron_mmrl.compat import declare_torchvision_ops
    from megatron_mmrl.models.tiny import TinySizes, make_tiny_checkpoint

    declare_torchvision_ops()
    from transformers import Qwen2_5_VLForConditionalGeneration

    directory = tmp_path_factory.mktemp(request.param)
    source, target = directory / "hf", directory / "megatron"
    sizes = TinySizes(num_heads=8, num_kv_heads=2, hidden=128, intermediate=192, vision_intermediate=100)
    make_tiny_checkpoint(source, tied=request.param == "tied", sizes=sizes)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(model.config.text_config.vocab_size - 1)
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    # Biases and norms are constants in a fresh model, which would hide that two of them are exchanged.
    noisy = {name: x + torch.randn(x.shape, generator=generator) * 0.1 for name, x in tensors.items() if x.dim() == 1}
    save_file(tensors | noisy, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(source, target, verify=False, progress=nothing)
    return source, target


LAYOUTS = [(1, 1, None), (2, 2, None), (1, 2, 2), (4, 1, None)]
LAYOUT_IDS = ["tp1", "tp2-pp2", "pp2-vpp2", "tp4 with 2 kv heads"]


def parallel_of(tensor: int, pipeline: int, virtual: int | None) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
    )


@pytest.mark.parametrize(("tensor", "pipeline", "virtual"), LAYOUTS, ids=LAYOUT_IDS)
def test_a_plain_gpt_model_reads_it(
    checkpoints: tuple[Path, Path], tensor: int, pipeline: int, virtual: int | None
) -> None:
    source, target = checkpoints
    results = run_ranks(_stock_rank, tensor * pipeline, source, target, parallel_of(tensor, pipeline, virtual))
    assert all(result["wrong"] == [] for result in results)
    assert sum(result["count"] for result in results) > 0
    # Vocabulary rows lie in chunks of 40, a rank's share is 160 or 80 of them: nothing is read that is not its own.
    assert all(result["read"] <= 1.02 * result["own"] for result in results), results
    if tensor * pipeline == 1:
        expected = _hf_logits(source)
        logits = results[0]["logits"]
        error = (logits[..., : expected.shape[-1]] - expected).abs().max()  # beyond the vocabulary there is padding
        assert error <= 1e-5 * max(1.0, expected.abs().max())


def _hf_logits(source: Path) -> torch.Tensor:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits


def _stock_rank(source: Path, target: Path, parallel: ParallelConfig) -> dict[str, object]:
    """Build mcore's own GPTModel from the stored arguments, load with mcore's own function, compare every parameter."""
    import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401  # before the stand-ins, which cover it
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_mmrl.models.hf_io import HFReader
    from megatron_mmrl.models.registry import stored_model
    from megatron_mmrl.parallel.state import initialize, shutdown

    initialize(parallel, 0)
    try:
        path = str(target / "release")
        chunks = _gpt_chunks(dist_checkpointing.load_common_state_dict(path)["args"], parallel)
        # What Megatron-LM's load_checkpoint does for a release without optimizer.
        keys = [f"model{i}" if len(chunks) > 1 else "model" for i in range(len(chunks))]
        wanted = {key: chunk.sharded_state_dict() for key, chunk in zip(keys, chunks, strict=True)}
        with pytest.MonkeyPatch.context() as patch:
            read = _count_loads(patch)
            loaded = dist_checkpointing.load(wanted, path)
        for key, chunk in zip(keys, chunks, strict=True):
            chunk.load_state_dict(loaded[key])
        reader, sizes = HFReader(source), stored_model(source)
        wrong = [name for chunk in chunks for name in _wrong_parameters(chunk, reader, sizes)]
        count = sum(len(list(chunk.parameters())) for chunk in chunks)
        logits = _logits(chunks[0]) if parallel_state.get_model_parallel_group().size() == 1 else None
        own = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
        return {"wrong": wrong, "count": count, "logits": logits, "read": sum(read), "own": own}
    finally:
        shutdown()


def _gpt_chunks(args, parallel: ParallelConfig) -> list:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
    )
    chunks = []
    for stage in range(parallel.virtual_pipeline_model_parallel_size or 1):
        vp_stage = stage if parallel.virtual_pipeline_model_parallel_size else None
        ends = {"ignore_virtual": False, "vp_stage": vp_stage}
        chunk = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage),
            vocab_size=padded_vocab_size(args.padded_vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",  # of text alone, mrope is the same
            rotary_base=args.rotary_base,
            vp_stage=vp_stage,
        )
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
        chunks.append(chunk)
    return chunks


def _wrong_parameters(chunk, reader, model) -> list[str]:
    """Parameters that are not the shard that the trainer's own table makes of the Hugging Face tensors."""
    from megatron.core import parallel_state

    from megatron_mmrl.models.qwen2_5_vl.config import TextSizes
    from megatron_mmrl.models.qwen2_5_vl.weights import weight_table

    config = chunk.config
    sizes = TextSizes(
        heads=config.num_attention_heads,
        groups=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab_size=model.shapes["model.embed_tokens.weight"][0],
        tied=chunk.share_embeddings_and_output_weights,
    )
    rank = parallel_state.get_tensor_model_parallel_rank()
    first = chunk.decoder.layers[0].layer_number - 1
    names = {f"language_model.{name}": parameter for name, parameter in chunk.named_parameters()}
    table = weight_table(names, sizes, first)
    return [
        name
        for name, parameter in names.items()
        if not table[name]
        .rule.split([reader[n] for n in table[name].hf_names], rank, config.tensor_model_parallel_size)
        .equal(parameter)
    ]


def _logits(chunk) -> torch.Tensor:
    ids = torch.tensor(IDS)
    positions = torch.arange(ids.shape[1])[None]
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1]).triu(1).bool()
    with torch.no_grad():
        return chunk(ids, positions, causal)


@pytest.mark.parametrize(("tensor", "pipeline", "virtual"), LAYOUTS, ids=LAYOUT_IDS)
def test_the_trainer_loads_it_and_reads_only_its_own(
    checkpoints: tuple[Path, Path], tensor: int, pipeline: int, virtual: int | None
) -> None:
    source, target = checkpoints
    results = run_ranks(_trainer_rank, tensor * pipeline, source, target, parallel_of(tensor, pipeline, virtual))
    for differing, read, own in results:
        assert differing == []
        assert own * 0.9 < read <= own * 1.02


@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual"),
    [(2, 2, None), pytest.param(4, 1, None, marks=pytest.mark.full)],
    ids=["tp2-pp2", "tp4"],
)
def test_what_megatron_saved_in_any_layout_becomes_the_same_files(
    checkpoints: tuple[Path, Path], tmp_path: Path, tensor: int, pipeline: int, virtual: int | None
) -> None:
    from megatron_mmrl.checkpoint.convert.megatron_to_hf import megatron_to_hf

    source, target = checkpoints
    saved = tmp_path / "iter_0000007"
    saved.mkdir()
    run_ranks(_saving_rank, tensor * pipeline, source, target, saved, parallel_of(tensor, pipeline, virtual))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    options = {"scheme": None, "max_file_bytes": 1 << 30, "files_from": source, "verify": False, "progress": nothing}
    megatron_to_hf(tmp_path, tmp_path / "back", **options)
    before = {to_original(name): x for name, x in load_file(source / "model.safetensors").items()}
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name, x in before.items() if not x.equal(after[name])] == []


def _saving_rank(source: Path, target: Path, saved: Path, parallel: ParallelConfig) -> None:
    """Load into a plain GPTModel and save that with mcore's own function, the vision tower beside it."""
    import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401  # before the stand-ins, which cover it
    from megatron.core import dist_checkpointing

    from megatron_mmrl.models.hf_io import HFReader
    from megatron_mmrl.parallel.state import initialize, shutdown

    initialize(parallel, 0)
    try:
        path = str(target / "release")
        (chunk,) = _gpt_chunks(dist_checkpointing.load_common_state_dict(path)["args"], parallel)
        chunk.load_state_dict(dist_checkpointing.load({"model": chunk.sharded_state_dict()}, path)["model"])
        reader = HFReader(source)
        vision = {
            name: dist_checkpointing.ShardedTensor.from_rank_offsets(
                name, reader[name][:], replica_id=torch.distributed.get_rank()
            )
            for name in reader.names
            if name.startswith("visual.")
        }
        dist_checkpointing.save({"model": chunk.sharded_state_dict(), "vision": vision}, str(saved))
    finally:
        shutdown()


def _trainer_rank(source: Path, target: Path, parallel: ParallelConfig) -> tuple[list[str], int, int]:
    """Parameters that differ from what Hugging Face's files give; bytes asked for; bytes of the parameters."""
    from megatron_mmrl.models.registry import build_model, load_checkpoint, open_checkpoint
    from megatron_mmrl.parallel.state import initialize, shutdown

    initialize(parallel, 0)
    try:
        model = ModelConfig(path=str(source))
        expected = build_model(source, parallel=parallel, model=model)
        load_checkpoint(expected, open_checkpoint(source))
        loaded = build_model(target, parallel=parallel, model=model)
        with pytest.MonkeyPatch.context() as patch:
            read = _count_reads(patch)
            load_checkpoint(loaded, open_checkpoint(target))
        pairs = zip(_parameters(expected), _parameters(loaded), strict=True)
        differing = [name for (name, a), (_, b) in pairs if not torch.equal(a, b)]
        return differing, sum(read), sum(parameter.nbytes for _, parameter in _parameters(loaded))
    finally:
        shutdown()


def _count_loads(patch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the chunks that torch's own reader loads: it takes them whole."""
    read, real = [], torch.load

    def counted(*args: object, **kwargs: object) -> object:
        loaded = real(*args, **kwargs)
        read.append(loaded.nbytes if isinstance(loaded, torch.Tensor) else 0)
        return loaded

    patch.setattr(torch, "load", counted)
    return read


def _count_reads(patch: pytest.MonkeyPatch) -> list[int]:
    read, real = [], os.preadv

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        read.append(real(descriptor, buffers, offset))
        return read[-1]

    patch.setattr(os, "preadv", counted)
    return read


def _parameters(chunks) -> list[tuple[str, torch.Tensor]]:
    return [(f"{i}.{name}", p) for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()]
