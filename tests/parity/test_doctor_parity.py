"""``mmrl doctor parity`` on a tiny model: agreement of all three sides, and every planted fault called by its name."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mmrl.commands import doctor_parity
from megatron_mmrl.config import ConfigError
from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.data.digits import DigitsOptions
from megatron_mmrl.data.images import to_png
from megatron_mmrl.data.processor import Processor
from megatron_mmrl.doctor.parity import ParityOptions, ParityReport, run_parity
from megatron_mmrl.doctor.parity_engine import EngineProbe
from megatron_mmrl.doctor.parity_megatron import read_result, score
from megatron_mmrl.doctor.parity_report import verdict
from megatron_mmrl.parallel.sharding import QKV
from megatron_mmrl.quickstart import prepare
from tests.dist.launch import run_ranks


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared")
    prepare(directory, DigitsOptions(task="both", train_rows=1, test_rows=8, image_size=84))
    return directory


@pytest.fixture(scope="module")
def options(prepared):
    return ParityOptions(checkpoint=prepared / "model", data=prepared / "test.parquet", samples=2, engine_tensor=None)


@pytest.fixture(scope="module", autouse=True)  # starts while the first tests run
def probe(prepared, tmp_path_factory):
    processor = Processor(str(prepared / "model"), DataConfig())
    directory = tmp_path_factory.mktemp("engine")
    with EngineProbe(prepared / "model", processor, tensor_parallel=1, dtype="float32", directory=directory) as probe:
        yield probe


def with_fault(prepare_chunks, request, directory):
    """Megatron's side with chunks that are altered after loading; several ranks if the layout asks for them."""
    request.write(directory)
    if request.parallel.world_size == 1:
        score(directory, prepare_chunks)
    else:
        run_ranks(score, request.parallel.world_size, directory, prepare_chunks)
    return read_result(request, directory)


@torch.no_grad()
def zero_vision(chunks):
    for chunk in chunks:
        for parameter in chunk.visual.parameters():
            parameter.zero_()


@torch.no_grad()
def random_vision(chunks):
    """What a tower holds that was built and never loaded."""
    torch.manual_seed(3)
    for parameter in chunks[0].visual.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02)


@torch.no_grad()
def permute_qkv(chunks, layer_number=3):
    """All queries, all keys, all values, where Megatron wants them group by group."""
    for chunk in chunks:
        for layer in chunk.language_model.decoder.layers:
            if layer.layer_number == layer_number:
                weight = layer.self_attention.linear_qkv.weight
                groups = layer.self_attention.num_query_groups_per_partition
                rows = weight.unflatten(0, (groups, -1, layer.self_attention.hidden_size_per_attention_head))
                parts = (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])
                moved = torch.cat([part.flatten(0, 2) for part in parts])
                assert not torch.equal(moved, weight) or groups == 1
                weight.copy_(moved if groups > 1 else weight.roll(8, 0))


def text_positions(chunks):
    """Counts on through images, as a text model would."""

    def hook(_, args, inputs):
        bounds = inputs["packed_seq_params"].cu_seqlens_q.tolist()
        counted = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)])
        return args, {**inputs, "position_ids": counted.expand(3, 1, -1)}

    for chunk in chunks:
        chunk.register_forward_pre_hook(hook, with_kwargs=True)


@torch.no_grad()
def wrong_output(chunks):
    chunks[-1].output_weight()[5] += 1.0


def sees(report: ParityReport) -> dict[str, bool | None]:
    return {side.name: side.sees for side in report.sides}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            zero_vision,
            ("first differs at visual.patch_embed", "visual.patch_embed.proj.weight is all zeros", "was not loaded"),
        ),
        (
            random_vision,
            ("first differs at visual.patch_embed", "visual.patch_embed.proj.weight differs by", "was not loaded"),
        ),
        (
            permute_qkv,
            (
                "first differs at model.layers.2.self_attn",
                "model.layers.2.self_attn.q_proj.weight, model.layers.2.self_attn.k_proj.weight",
                "numbers in another order",
            ),
        ),
        (text_positions, ("first differs at positions", "not Hugging Face's")),
        (wrong_output, ("first differs behind model.norm: lm_head.weight differs by up to 1",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_in_megatron_is_named(options, fault, words) -> None:
    report = run_parity(options, megatron=partial(with_fault, fault))
    (cause,) = report.causes
    assert cause.startswith("Megatron: test.parquet:")
    for word in words:
        assert word in cause
    assert verdict(report)[-1] == f"parity: no; {cause}"
    assert sees(report) == {"Hugging Face": True, "Megatron": fault is not zero_vision}


def test_a_rule_of_the_weight_table_that_permutes_is_narrowed_down(options, monkeypatch) -> None:
    """Weights are compared by the same rule, so only what the layer computes can tell."""
    split = QKV.split
    monkeypatch.setattr(QKV, "split", lambda *args: split(*args).flip(0))
    (cause,) = run_parity(options).causes
    assert "first differs at model.layers.0.self_attn" in cause
    assert "or the order of rows that the table's rule makes" in cause


def test_bfloat16_may_be_as_far_off_as_its_own_rounding(options) -> None:
    half = replace(options, dtype="bfloat16", samples=1)
    report = run_parity(half)
    assert report.agree
    assert 1e-3 < report.totals["Megatron - Hugging Face"].max <= report.allowed < 0.3
    (cause,) = run_parity(half, megatron=partial(with_fault, permute_qkv)).causes
    assert "first differs at model.layers.2.self_attn" in cause
    assert "model.layers.2.self_attn.q_proj.weight" in cause


@pytest.mark.parametrize(
    "layout",
    [
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
        {"context_parallel_size": 2, "tensor_model_parallel_size": 2},
    ],
    ids=["tp2-pp2-vpp2", "tp2-cp2"],
)
def test_a_fault_on_ranks_is_named(options, layout) -> None:
    wanted = replace(options, parallel=ParallelConfig(**layout))
    (cause,) = run_parity(wanted, megatron=partial(with_fault, permute_qkv)).causes
    assert "first differs at model.layers.2.self_attn" in cause
    assert "model.layers.2.self_attn.q_proj.weight" in cause


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, ("pixel_values differ by up to", "image_mean is [0.5, 0.5, 0.5] instead of")),
        (
            {"size": {"shortest_edge": 784, "longest_edge": 56 * 56}},
            ("image_grid_thw is [[1, 4, 4]] instead of [[1, 6, 6]]", "size is"),
        ),
    ],
    ids=["mean", "max_pixels"],
)
def test_another_processor_is_named(options, tmp_path, changes, words) -> None:
    other = tmp_path / "other"
    shutil.copytree(options.checkpoint, other)
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (other / name).exists():
            content = json.loads((other / name).read_text())
            content.get("image_processor", content).update(changes)
            (other / name).write_text(json.dumps(content))
    report = run_parity(replace(options, processor=other))
    (cause,) = report.causes
    assert cause.startswith("processor: test.parquet:0 (as is): ")
    for word in words:
        assert word in cause


def test_a_checkpoint_that_is_not_whole_is_refused(options, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    part = tmp_path / "part"
    shutil.copytree(options.checkpoint, part)
    tensors = load_file(part / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[lost]
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold its whole model: missing .*layers\.1\.mlp\.up_proj\.weight"):
        run_parity(replace(options, checkpoint=part))


@pytest.mark.full  # two more processes that import everything
def test_the_command_starts_ranks(options, tmp_path) -> None:
    out = tmp_path / "parity.json"
    asked = ["--checkpoint", options.checkpoint, "--data", options.data, "--samples", "1", "--skip-engine"]
    asked += ["--layout", "tensor=2", "--json", out]
    # A process of its own: starting ranks ends every other child of the process.
    command = [sys.executable, "-m", "megatron_mmrl.cli", "doctor", "parity", *map(str, asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "parity: yes, within 0.0001 nats"
    assert "Megatron sees: yes" in done.stdout
    content = json.loads(out.read_text())
    assert content["agree"] is True
    assert len(content["rows"]) == 3
    assert set(content["totals"]) == {"Megatron - Hugging Face"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--layout", "tensor=3"], "tensor_model_parallel_size=3"),
        (["--engine-tensor", "3"], "rollout.tensor_parallel_size=3"),
        (["--data", "none.parquet"], "none.parquet does not exist"),
        (["--checkpoint", "."], "has no config.json"),
        (["--samples", "0"], "at least 1"),
        (["--tolerance", "0"], "above 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_refuses(options, wrong, words) -> None:
    parser = argparse.ArgumentParser()
    doctor_parity.add_arguments(parser)
    asked = parser.parse_args(["--checkpoint", str(options.checkpoint), "--data", str(options.data), *wrong])
    with pytest.raises(ConfigError, match=words):
        doctor_parity.run(asked)


def test_all_three_agree_and_see(options, probe) -> None:
    probe.load(probe.tensors())
    report = run_parity(replace(options, engine_tensor=1, samples=4), engine=lambda *_: nullcontext(probe))
    assert report.agree
    assert sees(report) == {"Hugging Face": True, "Megatron": True, "SGLang": True}
    assert {row.way for row in report.rows} == {"as is", "blank", "no image"}
    assert len(report.rows) == 12
    assert max(total.max for total in report.totals.values()) <= 2e-5
    assert report.totals["SGLang - Megatron"].mean > 0
    assert verdict(report)[-1] == "parity: yes, within 0.0001 nats"


def test_faults_in_the_engine_are_narrowed_down(options, probe) -> None:
    def report(changed) -> ParityReport:
        probe.load((name, changed(name, tensor)) for name, tensor in probe.tensors())
        return run_parity(replace(options, engine_tensor=1), engine=lambda *_: nullcontext(probe))

    blind = report(lambda name, tensor: tensor * 0 if name.startswith("visual.merger") else tensor)
    assert sees(blind)["SGLang"] is False
    (cause,) = blind.causes
    assert cause.startswith("SGLang: the vision path differs")
    assert "visual.merger did not hold the checkpoint's weights" in cause
    mixed = report(lambda name, tensor: tensor.flip(0) if name == "model.layers.1.self_attn.q_proj.weight" else tensor)
    (cause,) = mixed.causes
    assert cause.startswith("SGLang: the language model differs")
    assert "): model.layers.1.self_attn did not hold" in cause


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (84, ("the vision path differs", "no image by at most", "not a matter of weights, which were sent again")),
        (112, ("the engine's processor reads other ids than ours", "ids instead of")),
    ],
    ids=["other pixels", "other ids"],
)
def test_an_engine_that_reads_images_otherwise_is_named(options, probe, monkeypatch, size, words) -> None:
    score_as_sent = probe.score
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)

    def score_other_images(variants):
        png = to_png(Image.fromarray(noise))
        prompts = [replace(v.prompt, images=(png,) * len(v.prompt.images)) for v in variants]
        return score_as_sent([replace(v, prompt=prompt) for v, prompt in zip(variants, prompts, strict=True)])

    probe.load(probe.tensors())
    monkeypatch.setattr(probe, "score", score_other_images)
    (cause,) = run_parity(replace(options, engine_tensor=1), engine=lambda *_: nullcontext(probe)).causes
    assert cause.startswith("SGLang: ")
    for word in words:
        assert word in cause
