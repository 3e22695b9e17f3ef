"""Write ``train.slurm`` beside every ``examples/*/train.sh``: the same run as a batch script for Slurm.

python tools/render_slurm_examples.py
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_mmrl.cluster.job import Job
from megatron_mmrl.cluster.plan import topology_of
from megatron_mmrl.cluster.slurm import render
from megatron_mmrl.config import load_config

ROOT = Path(__file__).resolve().parent.parent
GPUS_PER_NODE = 8
# What every site calls otherwise.
PLACEHOLDERS = (
    "cluster.slurm.account=ACCOUNT",
    "cluster.slurm.partition=PARTITION",
    "cluster.slurm.time_limit=1-00:00:00",
)


def scripts() -> dict[Path, str]:
    """Text of each script by its path."""
    return {script.with_suffix(".slurm"): _render(script) for script in sorted(ROOT.glob("examples/*/train.sh"))}


def _render(script: Path) -> str:
    found = re.search(r"--config (\S+)", script.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{script} has no --config")
    config = load_config(ROOT / found[1], PLACEHOLDERS)
    topology = topology_of(config, -(-config.parallel.world_size // GPUS_PER_NODE))
    return render(Job(config_file=Path(found[1]), overrides=(), config=config, topology=topology), "python")


if __name__ == "__main__":
    for path, text in scripts().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
