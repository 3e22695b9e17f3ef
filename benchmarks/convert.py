"""What a conversion costs beside a copy of the same files: time, and memory beyond the largest tensor.

    python -m benchmarks.convert [--layers 4] [--repeats 4] [--dir D] [--json FILE]

Makes a checkpoint with the widths of Qwen2.5-VL-7B and fewer layers (bfloat16), then copies it, converts it to Megatron
and converts that back, in turns, each in a process of its own. Copies end with fsync as conversions do. Nothing is
dropped from the page cache between runs: sources are warm for all alike, and times are the least of the repeats. Where
other programs use the machine, processor time (user and system) says more than time on the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import yaml

from megatron_mmrl.checkpoint.manifest import fsync
from megatron_mmrl.models.hf_io import write_checkpoint

CONFIG = Path(__file__).parent.parent / "configs" / "models" / "qwen2_5_vl_7b.yaml"
KINDS = ("seconds", "seconds_ratio", "cpu_seconds", "cpu_seconds_ratio")
TO_MEGATRON, TO_HF = "to Megatron", "to Hugging Face"


def make_source(directory: Path, num_layers: int) -> None:
    """Random weights (a block of them repeated) under the real names and shapes."""
    from megatron_mmrl.models.registry import stored_model

    config = yaml.safe_load(CONFIG.read_text())
    config["text_config"]["num_hidden_layers"] = num_layers
    plain = directory.with_name("config")
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config))
    block = torch.randn(1 << 24).bfloat16()
    sizes = ((name, shape, math.prod(shape)) for name, shape in stored_model(plain).shapes.items())
    tensors = ((name, block.repeat(-(-size // len(block)))[:size].view(shape)) for name, shape, size in sizes)
    write_checkpoint(directory, tensors, source=plain)


def run_task(task: str, source: Path, target: Path) -> dict[str, float]:
    """Do it in this process: seconds, processor seconds, and the most memory the process ever had."""
    from megatron_mmrl.checkpoint.convert.hf_to_megatron import hf_to_megatron
    from megatron_mmrl.checkpoint.convert.megatron_to_hf import megatron_to_hf
    from megatron_mmrl.models.registry import stored_model

    if task == "make":
        make_source(target, int(source.name))
        return {}
    model = stored_model(source)  # imports what a conversion imports, so that only the conversion is timed
    cpu, start = _cpu_seconds(), time.perf_counter()
    if task == "copy":
        subprocess.run(["cp", "-r", source, target], check=True)
        for file in target.rglob("*"):
            fsync(file)
    elif task == TO_MEGATRON:
        hf_to_megatron(source, target, verify=False, progress=_silent)
    elif task == TO_HF:
        options = {"scheme": None, "max_file_bytes": 5 * 10**9, "files_from": None, "verify": False}
        megatron_to_hf(source, target, **options, progress=_silent)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": _cpu_seconds() - cpu,
        "peak_bytes": _peak_bytes(),
        "largest_bytes": max(2 * math.prod(shape) for shape in model.shapes.values()),
    }


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _peak_bytes() -> int:
    """The most memory this process had since it began; ``ru_maxrss`` counts that of its parent too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _silent(what: str, num_bytes: int) -> None: ...


def measure(task: str, source: Path, target: Path) -> dict[str, float]:
    """The same in a process of its own; ``target`` stays for whoever reads it next."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.convert", "--task", task, str(source), str(target)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare_with_copy(directory: Path, num_layers: int, repeats: int) -> dict[str, float]:
    """Least seconds of each task, ratios to the copy, and memory in units of the largest tensor."""
    source, copied = directory / "source", directory / "copied"
    megatron, back = directory / "megatron", directory / "back"
    measure("make", Path(str(num_layers)), source)
    idle = measure("nothing", source, copied)
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        for task, start, end in (("copy", source, copied), (TO_MEGATRON, source, megatron), (TO_HF, megatron, back)):
            runs.setdefault(task, []).append(measure(task, start, end))
            if task != TO_MEGATRON:  # the next task reads that; what is not needed leaves the page cache
                shutil.rmtree(end)
    numbers = {"checkpoint_bytes": sum(file.stat().st_size for file in source.iterdir())}
    numbers |= {"largest_bytes": idle["largest_bytes"], "idle_bytes": idle["peak_bytes"]}
    for task, results in runs.items():
        for kind in ("seconds", "cpu_seconds"):
            numbers[f"{task}/{kind}"] = min(run[kind] for run in results)
            numbers[f"{task}/{kind}_ratio"] = numbers[f"{task}/{kind}"] / numbers[f"copy/{kind}"]
        extra = max(run["peak_bytes"] for run in results) - idle["peak_bytes"]
        numbers[f"{task}/memory_ratio"] = extra / idle["largest_bytes"]
    return numbers


def main() -> None:
    """Measure, print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--dir", type=Path, help="disk to measure on (default: that of temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task, source, target = options.task
        print(json.dumps(run_task(task, Path(source), Path(target))))
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        numbers = compare_with_copy(Path(directory), options.layers, options.repeats)
    gib = 2**30
    sizes = {name: numbers[f"{name}_bytes"] / gib for name in ("checkpoint", "largest", "idle")}
    print(
        f"\n{platform.machine()}, {psutil.cpu_count()} cores; checkpoint of {sizes['checkpoint']:.2f} GiB, its largest"
    )
    print(f"tensor {sizes['largest']:.2f} GiB; a process that converts nothing has {sizes['idle']:.2f} GiB")
    print(f"{'':<16}{'seconds':>8}{'x copy':>8}{'CPU s':>8}{'x copy':>8}{'memory / largest tensor':>25}")
    for task in ("copy", TO_MEGATRON, TO_HF):
        of = {kind: numbers[f"{task}/{kind}"] for kind in (*KINDS, "memory_ratio")}
        print(
            f"{task:<16}{of['seconds']:8.2f}{of['seconds_ratio']:8.2f}{of['cpu_seconds']:8.2f}"
            f"{of['cpu_seconds_ratio']:8.2f}{of['memory_ratio']:25.2f}"
        )
    print("goals: at most 1.5 x the copy (aim 1.2), memory at most 3 x the largest tensor")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
