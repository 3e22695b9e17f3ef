"""What a conversion costs beside a copy of the same files: time, and memory beyond the largest tensor.

    python -m benchmarks.convert [--layers 1] [--repeats 5] [--dir D] [--json FILE]

Makes a checkpoint with the widths of Qwen2.5-VL-3B and fewer layers (bfloat16), then copies it (``cp``, then fsync, as
conversions end with fsync too), converts it to Megatron and converts that back, in turns. Nothing is dropped from the
page cache between runs: sources are as warm for one as for the other. Times are the least of the repeats; where other
programs use the machine, processor time (user and system) says more. Memory is that of processes of their own.
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

CONFIG = Path(__file__).parent.parent / "configs" / "models" / "qwen2_5_vl_3b.yaml"
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


def run(task: str, source: Path, target: Path) -> None:
    """Do ``task`` in this process."""
    from megatron_mmrl.checkpoint.convert.hf_to_megatron import hf_to_megatron
    from megatron_mmrl.checkpoint.convert.megatron_to_hf import megatron_to_hf
    from megatron_mmrl.models.registry import stored_model

    if task == "make":
        make_source(target, int(source.name))
    elif task == "nothing":
        stored_model(source)
    elif task == "copy":
        subprocess.run(["cp", "-r", source, target], check=True)
        for file in target.rglob("*"):
            fsync(file)
    elif task == TO_MEGATRON:
        hf_to_megatron(source, target, verify=False, progress=_silent)
    else:
        options = {"scheme": None, "max_file_bytes": 5 * 10**9, "files_from": None, "verify": False}
        megatron_to_hf(source, target, **options, progress=_silent)


def _silent(what: str, num_bytes: int) -> None: ...


def run_apart(task: str, source: Path, target: Path) -> int:
    """The same in a process of its own; returns the most memory that it had, in bytes."""
    command = [sys.executable, "-m", "benchmarks.convert", "--task", task, str(source), str(target)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _peak_bytes() -> int:
    """The most memory this process had since it began; ``ru_maxrss`` counts that of its parent too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def compare_with_copy(directory: Path, num_layers: int, repeats: int) -> dict[str, float]:
    """Least seconds of each task, ratios to the copy, and memory in units of the largest tensor."""
    from megatron_mmrl.models.registry import stored_model

    source, megatron, out = directory / "source", directory / "megatron", directory / "out"
    run_apart("make", Path(str(num_layers)), source)
    idle = run_apart("nothing", source, out)
    largest = max(2 * math.prod(shape) for shape in stored_model(source).shapes.values())
    numbers = {"checkpoint_bytes": sum(file.stat().st_size for file in source.iterdir())}
    numbers |= {"largest_bytes": largest, "idle_bytes": idle}
    numbers[f"{TO_MEGATRON}/memory_ratio"] = (run_apart(TO_MEGATRON, source, megatron) - idle) / largest
    numbers[f"{TO_HF}/memory_ratio"] = (run_apart(TO_HF, megatron, out) - idle) / largest
    shutil.rmtree(out)
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        for task, start in (("copy", source), (TO_MEGATRON, source), (TO_HF, megatron)):
            cpu, clock = _cpu_seconds(), time.perf_counter()
            run(task, start, out)
            times.setdefault(task, []).append((time.perf_counter() - clock, _cpu_seconds() - cpu))
            shutil.rmtree(out)
    for task, pairs in times.items():
        for kind, values in zip(("seconds", "cpu_seconds"), zip(*pairs, strict=True), strict=True):
            numbers[f"{task}/{kind}"] = min(values)
            numbers[f"{task}/{kind}_ratio"] = min(values) / numbers[f"copy/{kind}"]
    return numbers


def main() -> None:
    """Measure, print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="disk to measure on (default: that of temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task, source, target = options.task
        run(task, Path(source), Path(target))
        print(_peak_bytes())
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
        times = (f"{numbers[f'{task}/{kind}']:8.2f}" for kind in KINDS)
        memory = f"{numbers[f'{task}/memory_ratio']:25.2f}" if task != "copy" else ""
        print(f"{task:<16}{''.join(times)}{memory}")
    print("goals: at most 1.5 x the copy (aim 1.2), memory at most 3 x the largest tensor")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
