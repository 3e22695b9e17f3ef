"""Blocks of GPU memory that another process maps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from megatron_mmrl.reshard.memory import SharedBlock, open_block, typed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OWNER = """
import json, sys, torch
from megatron_mmrl.reshard.memory import SharedBlock
block = SharedBlock(3_000_000, torch.device("cuda", 0))
block.tensor[1_000] = 7
torch.cuda.synchronize()
print(json.dumps(block.handle), flush=True)
sys.stdin.readline()
print(int(block.tensor[2_000_000]), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def owner() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    yield process
    process.kill()
    process.communicate()


def test_two_processes_see_one_memory(owner: subprocess.Popen) -> None:
    handle = json.loads(owner.stdout.readline())
    memory = open_block(handle)
    assert (memory.shape, memory.device) == ((3_000_000,), torch.device("cuda", 0))
    assert memory.nonzero().flatten().tolist() == [1_000]
    memory[2_000_000] = 42
    torch.cuda.synchronize()
    owner.stdin.write("\n")
    assert owner.stdout.readline() == "42\n"
    assert open_block(handle).data_ptr() == memory.data_ptr()  # opened once and kept


def test_a_block_is_memory_like_any_other() -> None:
    block = SharedBlock(1 << 22, torch.device("cuda", 0))
    assert not block.tensor.any()
    torch.manual_seed(0)
    values = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    inside = typed(block.tensor, 256, (512, 1024), torch.bfloat16)
    inside.copy_(values)
    assert torch.equal(inside @ inside.T, values @ values.T)
    used = torch.cuda.memory_allocated()
    del block, inside  # never freed: another process may have it mapped
    assert torch.cuda.memory_allocated() == used  # and never in the books of torch's allocator


def test_its_own_process_cannot_open_a_block() -> None:
    with pytest.raises(RuntimeError, match="cuIpcOpenMemHandle_v2 failed"):
        open_block(SharedBlock(4096, torch.device("cuda", 0)).handle)


def test_a_device_that_is_not_visible_is_named() -> None:
    handle = {**SharedBlock(4096, torch.device("cuda", 0)).handle, "device": "elsewhere"}
    with pytest.raises(ValueError, match="the memory is on GPU elsewhere; this process sees only"):
        open_block(handle)
