"""Blocks of memory that another process maps: the same bytes, no name, and nothing left when both have ended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_mmrl.reshard.memory import SharedBlock, open_block, typed
from megatron_mmrl.reshard.places import ALIGNMENT, packed

CPU = torch.device("cpu")
OWNER = """
import json, sys, torch
from megatron_mmrl.reshard.memory import SharedBlock
block = SharedBlock(3_000_000, torch.device("cpu"))
block.tensor[1_000] = 7
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


def users(inode: int) -> set[int]:
    """Processes that have the anonymous file mapped."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mapped = re.findall(r"(\d+) +/memfd:mmrl-weights", (process / "maps").read_text())
        except OSError:  # it ended meanwhile, or belongs to another user
            continue
        if str(inode) in mapped:
            found.add(int(process.name))
    return found


def test_two_processes_see_one_memory_that_goes_with_them(owner: subprocess.Popen) -> None:
    handle = json.loads(owner.stdout.readline())
    named = set(os.listdir("/dev/shm"))
    memory = open_block(handle)
    assert memory.shape == (3_000_000,)
    assert memory.nonzero().flatten().tolist() == [1_000]
    memory[2_000_000] = 42
    owner.stdin.write("\n")
    assert owner.stdout.readline() == "42\n"
    assert users(handle["inode"]) == {owner.pid, os.getpid()}

    owner.kill()
    owner.wait()
    assert int(memory[1_000]) == 7  # what is mapped stays
    with pytest.raises(OSError, match=str(owner.pid)):
        open_block(handle)
    assert users(handle["inode"]) == {os.getpid()}
    del memory
    assert users(handle["inode"]) == set()
    assert not {name for name in set(os.listdir("/dev/shm")) - named if "mmrl" in name}


def test_a_block_keeps_its_size() -> None:
    block = SharedBlock(5_000, CPU)
    for size in (4_999, 5_001):
        with pytest.raises(PermissionError):
            os.truncate(f"/proc/self/fd/{block.handle['descriptor']}", size)


def test_a_block_returns_its_memory() -> None:
    opened = len(os.listdir("/proc/self/fd"))
    block = SharedBlock(5_000, CPU)
    inode = block.handle["inode"]
    view = typed(block.tensor, 0, (10,), torch.float32)
    del block
    view += 1  # a view keeps the memory, not the block
    assert users(inode) == {os.getpid()}
    del view
    assert users(inode) == set()
    assert len(os.listdir("/proc/self/fd")) == opened


def test_another_file_in_the_place_of_the_block_is_refused() -> None:
    block, other = SharedBlock(5_000, CPU), SharedBlock(5_000, CPU)
    stale = {**block.handle, "descriptor": other.handle["descriptor"]}
    with pytest.raises(ValueError, match="is not the block of 5000 bytes that it was"):
        open_block(stale)
    with pytest.raises(ValueError, match="is not the handle of a shared block"):
        open_block({"kind": "file", "path": "/etc/hostname"})


def test_an_empty_block_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SharedBlock(0, CPU)


def test_typed_views_share_the_memory_and_stay_inside() -> None:
    block = SharedBlock(100, CPU)
    view = typed(block.tensor, 40, (3, 5), torch.float32)
    view.fill_(1.0)
    assert block.tensor.nonzero().flatten().min() >= 40
    assert view.data_ptr() == block.tensor.data_ptr() + 40
    for offset, shape in ((44, (3, 5)), (42, (1,)), (-4, (1,))):
        with pytest.raises(ValueError, match="does not fit into a block of 100 bytes"):
            typed(block.tensor, offset, shape, torch.float32)


def test_packed_things_are_aligned_and_do_not_overlap() -> None:
    sizes = [1, 256, 257, 0, 1000]
    offsets, nbytes = packed(sizes)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert all(end <= start for end, start in zip(ends, [*offsets[1:], nbytes], strict=True))
    assert nbytes == 256 + 256 + 512 + 1024
