"""Checkpoints are whole or absent: after a kill at every single step of saving, and after every kind of damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from megatron_mmrl.checkpoint.manager import CheckpointManager, whole_checkpoints
from megatron_mmrl.checkpoint.manifest import CheckpointError

WATCHED = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree"}


class Alone:
    """The collectives of a world of one rank."""

    rank, world_size = 0, 1

    def all_gather(self, value: object) -> list:
        return [value]

    def broadcast(self, value: object, src: int = 0) -> object:
        return value

    def barrier(self) -> None: ...


def writer(step: int):
    def write(directory: Path) -> None:
        (directory / "model").mkdir()
        (directory / "model" / "weights").write_text(f"weights {step}")
        (directory / "state").write_text(f"state {step}")

    return write


def read(directory: Path) -> tuple[str, str]:
    return (directory / "model" / "weights").read_text(), (directory / "state").read_text()


def manager(root: Path, keep: int = 2) -> CheckpointManager:
    return CheckpointManager(root, keep, Alone())


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def save_and_die(root: Path, step: int, fatal: int) -> bool:
    """Save in a child that is killed with SIGKILL just before its ``fatal``-th file operation; true if it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def tick(*_: object) -> None:
            nonlocal count
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        fsync = os.fsync
        os.fsync = lambda descriptor: (tick(), fsync(descriptor))
        sys.addaudithook(lambda event, _: tick() if event in WATCHED else None)
        manager(root).save(step, writer(step))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_anywhere_leaves_the_old_or_the_new_one_whole(tmp_path: Path):
    start = tmp_path / "start"
    for step in (1, 2):
        manager(start).save(step, writer(step))
    outcomes, fatal, killed = [], 0, True
    while killed:
        fatal += 1
        root = tmp_path / str(fatal)
        shutil.copytree(start, root)
        killed = save_and_die(root, 3, fatal)
        finals = [path for path in root.iterdir() if ".tmp-" not in path.name]
        assert sorted(finals) == whole_checkpoints(root)  # nothing half done carries a final name

        after = manager(root)
        newest = after.latest()
        step = int(newest.name.removeprefix("step_"))
        assert after.load(newest, read) == (f"weights {step}", f"state {step}")
        outcomes.append(step)
        after.save(3, writer(3))
        assert names(root)[-2:] == ["step_2", "step_3"]
        assert not list(root.glob("*.tmp-*"))
    assert fatal > 15
    assert outcomes == sorted(outcomes)  # 2, 2, ... until the rename, then 3
    assert set(outcomes) == {2, 3}


def test_the_newest_are_kept(tmp_path: Path):
    kept = manager(tmp_path / "two", keep=2)
    assert kept.latest() is None
    for step in (1, 5, 10, 9):
        kept.save(step, writer(step))
    assert names(tmp_path / "two") == ["step_10", "step_9"]
    assert kept.latest() == tmp_path / "two" / "step_10"  # by number, not by name
    everything = manager(tmp_path / "all", keep=0)
    for step in range(5):
        everything.save(step, writer(step))
    assert len(names(tmp_path / "all")) == 5


def test_saving_a_step_again_changes_nothing(tmp_path: Path):
    saver = manager(tmp_path)
    saver.save(3, writer(3))
    saver.save(3, writer(99))
    assert saver.load(tmp_path / "step_3", read) == ("weights 3", "state 3")


def cut(directory: Path) -> None:
    (directory / "state").write_text("s")


def lose(directory: Path) -> None:
    (directory / "model" / "weights").unlink()


def unfinished(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def garble(directory: Path) -> None:
    (directory / "manifest.json").write_text('{"format": 1, "st')


def other_format(directory: Path) -> None:
    (directory / "manifest.json").write_text(json.dumps({"format": 2}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "step_2/state has 1 bytes, its manifest says 7"),
        (lose, "lacks model/weights"),
        (unfinished, "has no manifest.json: it was never finished"),
        (garble, "cannot be read"),
        (other_format, "has format 2, this program reads 1"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name_and_can_be_replaced(tmp_path: Path, caplog, damage, message: str):
    saver = manager(tmp_path)
    for step in (1, 2):
        saver.save(step, writer(step))
    damage(tmp_path / "step_2")
    assert saver.latest() == tmp_path / "step_1"
    assert "step_2" in caplog.text
    assert message in caplog.text
    with pytest.raises(CheckpointError, match="to continue from an earlier checkpoint"):
        saver.load(tmp_path / "step_2", read)
    saver.save(2, writer(2))
    assert saver.load(saver.latest(), read) == ("weights 2", "state 2")


def test_a_flipped_bit_is_refused_before_anything_is_read(tmp_path: Path):
    saver = manager(tmp_path)
    saver.save(1, writer(1))
    (tmp_path / "step_1" / "state").write_text("state 2")  # same size
    with pytest.raises(CheckpointError, match=r"step_1/state has hash .*, its manifest says"):
        saver.load(saver.latest(), read)


def test_an_empty_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no rank wrote anything"):
        manager(tmp_path).save(1, lambda _: None)
    assert manager(tmp_path).latest() is None


def test_other_content_of_the_directory_is_left_alone(tmp_path: Path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "step_1_backup").mkdir()
    saver = manager(tmp_path, keep=1)
    for step in (1, 2):
        saver.save(step, writer(step))
    assert names(tmp_path) == ["notes", "step_1_backup", "step_2"]
