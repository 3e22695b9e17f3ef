"""The KV cache that the memory estimate counts is the one that a real engine has."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.memory.engine import engine_bytes
from megatron_mmrl.memory.model import model_sizes
from megatron_mmrl.models.registry import read_hf_config
from megatron_mmrl.models.tiny import make_tiny_checkpoint
from megatron_mmrl.rollout.server_args import EngineModel
from megatron_mmrl.rollout.sglang_server import ServerProcess, start_server

pytestmark = pytest.mark.full
TOKENS = 100_000  # SGLang tells GiB with three digits


@pytest.mark.parametrize("tensor", [1, 4])  # as many ranks as that repeat the two key/value heads
def test_kv_cache_is_what_the_engine_reports(tmp_path: Path, tensor: int) -> None:
    make_tiny_checkpoint(tmp_path / "model")
    rollout = RolloutConfig(max_total_tokens=TOKENS, tensor_parallel_size=tensor)
    model = EngineModel(path=tmp_path / "model", dtype="float32", device="cpu")
    server = start_server(rollout, model, banned_token_ids=[], log_path=tmp_path / "engine.log")
    try:
        server.wait_until_ready()
        memory = reported(server)
    finally:
        server.stop()
    sizes = model_sizes(read_hf_config(tmp_path / "model"))
    planned = engine_bytes(sizes, rollout, "float32", weights=0, device_bytes=0)
    assert planned.kv_tokens == memory["token_capacity"] == TOKENS
    assert planned.kv_cache / 2**30 == pytest.approx(memory["kvcache"], abs=0.0006)
    assert memory["kvcache"] > 0.05  # or three digits would say little


def reported(server: ServerProcess) -> dict[str, float]:
    """What the engine's first rank says of its memory, in GiB and tokens."""
    request = urllib.request.Request(
        f"{server.endpoint.url}/server_info", headers={"Authorization": f"Bearer {server.endpoint.api_key}"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return json.load(answer)["internal_states"][0]["memory_usage"]
