"""The command line of the converters, the plan of their files, and their progress bar."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mmrl.checkpoint.convert.megatron_to_hf import group_by_size
from megatron_mmrl.checkpoint.convert.plan import chunk_slices
from megatron_mmrl.checkpoint.convert.stream import Buffer, blocks, one_ahead
from megatron_mmrl.commands.convert import tool
from megatron_mmrl.metrics.byte_bar import byte_bar
from megatron_mmrl.models.stored import row_runs
from megatron_mmrl.parallel.sharding import QKV, GateUp, Replicated, Row, Vocab
from tests.unit.convert_case import make_source

ROOT = Path(__file__).parents[2]
RULES = [
    (QKV(heads=6, groups=2, head_dim=4), (40, 3), [(24, 3), (8, 3), (8, 3)]),
    (GateUp(), (12, 3), [(6, 3), (6, 3)]),
    (Row(), (3, 12), [(3, 12)]),
    (Vocab(10), (10, 3), [(10, 3)]),
    (Replicated(), (7, 3), [(7, 3)]),
]


@pytest.mark.parametrize(("rule", "stored", "shapes"), RULES, ids=[type(rule).__name__ for rule, _, _ in RULES])
def test_chunks_and_runs_cover_a_part_exactly_once(rule, stored: tuple[int, int], shapes: list) -> None:
    counted = torch.zeros(stored)
    for box in chunk_slices(rule, stored):
        counted[box] += 1
    assert counted.eq(1).all()
    full = [torch.randn(shape) for shape in shapes]
    part = rule.split(full, 0, 1)
    for tensor, runs in zip(full, row_runs(rule, stored[0]), strict=True):
        found = torch.cat([part[run.stored_first : run.stored_first + run.end - run.first] for run in runs])
        assert found.equal(tensor)


def test_groups_of_files_respect_the_limit_and_the_order() -> None:
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 4}
    assert group_by_size(sizes, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert group_by_size(sizes, 100) == [list(sizes)]


def test_blocks_cover_all_rows_within_the_limit() -> None:
    rows = [(part.start, part.stop) for part in blocks((10, 8 << 20), 10 * (8 << 20))]
    assert rows == [(0, 4), (4, 8), (8, 10)]
    assert [(part.start, part.stop) for part in blocks((2, 1 << 30), 2 << 30)] == [(0, 1), (1, 2)]  # a row at least


def test_a_buffer_is_used_again() -> None:
    buffer = Buffer()
    first = buffer.take((4, 4), torch.float32)
    assert buffer.take((8,), torch.bfloat16).data_ptr() == first.data_ptr()
    assert buffer.take((5, 5), torch.float32).shape == (5, 5)


def test_at_most_one_item_is_made_ahead_and_failures_arrive_in_order() -> None:
    made = []

    def items():
        for i in range(5):
            made.append(i)
            if i == 3:
                raise ValueError("three")
            yield i

    ahead = one_ahead(items())
    for item in (0, 1, 2):
        assert next(ahead) == item
        assert len(made) <= item + 2
    with pytest.raises(ValueError, match="three"):
        next(ahead)


def test_the_tool_converts_verifies_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path / "source")
    capsys.readouterr()  # what transformers said
    assert tool("hf-to-megatron", "", [str(source), str(tmp_path / "m"), "--verify"]) == 0
    assert tool("megatron-to-hf", "", [str(tmp_path / "m"), str(tmp_path / "h"), "--max-file-size", "0.2MB"]) == 0
    out = capsys.readouterr()
    assert out.out.count("57 tensors, ") == 2
    assert "57 tensors read back, equal in every bit; largest difference 0" in out.out
    assert out.err == ""  # no bar where no terminal is
    assert len(list((tmp_path / "h").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("size", ["0", "five", "5TB", "-1GB"])
def test_an_odd_size_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tool("megatron-to-hf", "", ["a", "b", f"--max-file-size={size}"])
    assert end.value.code == 2
    assert "write 5GB, 500MB or 4GiB" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hf_to_megatron", "megatron_to_hf"])
def test_the_scripts_are_the_command(name: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--verify" in shown
    assert f"mmrl convert {name.replace('_', '-')}" in shown


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_on_a_terminal_only() -> None:
    for stream, shows in ((_Terminal(), True), (io.StringIO(), False)):
        with byte_bar(1 << 20, stream) as advance:
            advance("model.norm.weight", 1 << 19)
            advance("lm_head.weight", 1 << 19)
        assert ("lm_head.weight" in stream.getvalue()) == shows
        assert ("1.0/1.0 MiB" in stream.getvalue()) == shows
