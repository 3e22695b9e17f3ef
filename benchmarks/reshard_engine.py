"""Hand-overs to a real SGLang on this machine: weights that are shared, against weights that are sent.

One trainer rank and one engine of one rank share a device, weights and, on a GPU, CUDA graphs. Measured in turn:

- ``plan``: the copies of ``reshard.execute``; ``hand-over``: all of ``SharedWeights.publish``;
- ``copy``: one plain copy, on the device, of as many bytes as the plan copies;
- ``by names``: full tensors under Hugging Face names, over HTTP (``reshard.method=reference``);
- ``bucket``: SGLang's own flattened bucket, its tensors passed by CUDA IPC. On a GPU only: on a CPU its pickler passes
  file descriptors, which the engine cannot receive.

Greedy answers with their log-probs must be equal, to the bit, before and after all of it.

The CUDA side has not been run yet.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from megatron_mmrl.config import Config, load_config
from megatron_mmrl.types import Message, Prompt, SamplingParams

if TYPE_CHECKING:
    from megatron_mmrl.build import Machinery
    from megatron_mmrl.models.tiny import TinySizes
    from megatron_mmrl.rollout.engine import RolloutEngine
    from megatron_mmrl.rollout.sglang_client import SGLangEngine

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=16)
QUESTIONS = ("Name a colour.", "What is 7 x 8?", "Spell the word tensor.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpeed:
    """Medians, seconds."""

    device: str
    shared_bytes: int
    copied_bytes: int
    plan_s: float
    publish_s: float
    copy_s: float
    names_s: float
    bucket_s: float | None


def measure(device: str, rounds: int) -> EngineSpeed:
    """Measure and print. ``device``: "cpu" or "cuda"."""
    if (device == "cuda") != torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine {'has' if torch.cuda.is_available() else 'has no'} CUDA")
    with tempfile.TemporaryDirectory() as directory, _machine(device, Path(directory)) as machine:
        machine.handover.publish(0)
        before = _answers(machine)
        seconds, copied, shared = _timed_rounds(machine, device, rounds)
        if _answers(machine) != before:
            raise AssertionError("greedy answers or their log-probs changed although no weight did")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    speed = EngineSpeed(
        device=device,
        shared_bytes=shared,
        copied_bytes=copied,
        plan_s=medians["plan"],
        publish_s=medians["publish"],
        copy_s=medians["copy"],
        names_s=medians["names"],
        bucket_s=medians.get("bucket"),
    )
    print(_line(speed))
    return speed


def _line(speed: EngineSpeed) -> str:
    bucket = f"{speed.bucket_s * 1e3:.1f} ms" if speed.bucket_s else "-"
    return (
        f"engine on {speed.device}: shared {speed.shared_bytes / 1e6:.1f} MB, copied {speed.copied_bytes / 1e6:.1f} MB"
        f" | plan {speed.plan_s * 1e3:.2f} ms, plain copy {speed.copy_s * 1e3:.2f} ms"
        f" | hand-over {speed.publish_s * 1e3:.1f} ms, by names {speed.names_s * 1e3:.1f} ms, bucket {bucket}"
    )


def _timed_rounds(machine: Machinery, device: str, rounds: int) -> tuple[dict[str, list[float]], int, int]:
    seconds: dict[str, list[float]] = defaultdict(list)
    engines: list[RolloutEngine] = []
    machine.fleet.everywhere(lambda _, engine: engines.append(engine))
    counters = machine.handover.counters()
    copied, shared = int(counters["reshard/copy_bytes"]), int(counters["reshard/alias_bytes"])
    source = torch.zeros(max(1, copied), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    for version in range(3, 3 * rounds + 3, 3):
        seconds["publish"].append(_seconds(device, machine.handover.publish, version))
        seconds["plan"].append(machine.handover.counters()["time/reshard_s"])
        seconds["copy"].append(_seconds(device, target.copy_, source))
        by_names = machine.fleet.update_weights
        seconds["names"].append(_seconds(device, by_names, machine.policy.weights, version + 1))
        if device == "cuda":
            engine = cast("SGLangEngine", engines[0])
            seconds["bucket"].append(_seconds(device, _send_bucket, machine, engine, version + 2))
    return seconds, copied, shared


def _seconds(device: str, work: Callable[..., object], *arguments: object) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _send_bucket(machine: Machinery, engine: SGLangEngine, version: int) -> None:
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    engine.pause()
    bucket = FlattenedTensorBucket(named_tensors=list(machine.policy.weights()))
    content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    engine._load(
        "sending a bucket", [MultiprocessingSerializer.serialize(content, output_str=True)], "flattened_bucket"
    )
    engine.set_version(version)


def _answers(machine: Machinery) -> list[tuple[list[int], list[float]]]:
    prompts = [
        machine.processor.encode(
            Prompt(
                id=f"q{number}", source="benchmark", messages=(Message(role="user", text=text),), images=(), answer=""
            )
        )
        for number, text in enumerate(QUESTIONS)
    ]
    with machine.handover.generating():
        groups = [machine.fleet.generate([prompt], GREEDY, seed=0, step=0)[0] for prompt in prompts]
    return [(group.responses[0].ids.tolist(), group.responses[0].logprobs.tolist()) for group in groups]


@contextmanager
def _machine(device: str, directory: Path) -> Iterator[Machinery]:
    from megatron_mmrl.build import machinery
    from megatron_mmrl.models.tiny import make_tiny_checkpoint

    make_tiny_checkpoint(directory / "model", sizes=_sizes(device))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    scratch = directory / "scratch"
    scratch.mkdir()
    with machinery(_config(device, directory), scratch) as machine:
        yield machine


def _config(device: str, directory: Path) -> Config:
    overrides = [
        f"model.path={directory / 'model'}",
        f"model.dtype={'bfloat16' if device == 'cuda' else 'float32'}",
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
        "reshard.verify_every=1000",
    ]
    return load_config(QUICKSTART, overrides)


def _sizes(device: str) -> TinySizes:
    """A few layers of 7B's width on a GPU; on a CPU the default."""
    from megatron_mmrl.models.tiny import TinySizes

    if device == "cpu":
        return TinySizes()
    return TinySizes(num_layers=8, hidden=3584, num_heads=28, num_kv_heads=4, intermediate=18944)
