"""``mmrl data prepare`` against decoding the same pictures and doing nothing with them: rows a second, and memory.

    python -m benchmarks.data [--rows 2000] [--jobs 2] [--repeats 3] [--json FILE]

Both read the same jsonl file, whose pictures (drawn diagrams as PNG, shaded scenes as JPEG, 640 x 480) lie beside it,
with the same number of processes, in turn; the best time of each counts. ``ratio`` is the speed of preparing (read,
decode, hash, embed, split, write) over that of decoding alone. Both are timed on the clock and in processor time, which
suffers less from other work on the machine. Memory is the peak of the parent and of the largest process, at this number
of rows and at a quarter of it: it must not grow with the rows.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.images import open_image
from megatron_mmrl.data.parts import row_reader
from megatron_mmrl.data.prepare import PrepareOptions, prepare
from megatron_mmrl.data.raw import Span, plan_spans, read_span
from megatron_mmrl.data.workers import ordered_map

_SIZE = (640, 480)
_LIMIT = 40_000_000
_DISTINCT = 200  # pictures; each file of them is named by many rows, and read anew for each


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one pass over all rows."""

    wall_s: float
    cpu_s: float
    parent_peak_bytes: int
    process_peak_bytes: int  # of the largest process


def make_rows(folder: Path, num_rows: int) -> Path:
    """A jsonl file of MM-Eureka's form with its pictures; the same numbers give the same files."""
    (folder / "img").mkdir(parents=True)
    names = [_draw(folder / "img", number) for number in range(_DISTINCT)]
    file = folder / "rows.jsonl"
    with file.open("w") as lines:
        for row in range(num_rows):
            turns = [{"role": "user", "content": f"<image>Question {row}?"}]
            image = f"img/{names[row % _DISTINCT]}"
            lines.write(json.dumps({"id": row, "conversations": turns, "answer": row, "image_urls": [image]}) + "\n")
    return file


def _draw(folder: Path, number: int) -> str:
    rng = np.random.default_rng(number)
    down, across = np.mgrid[0 : _SIZE[1], 0 : _SIZE[0]]
    photo = number % 2 == 0
    base = (down[..., None] * rng.random(3) * 0.2 + across[..., None] * rng.random(3) * 0.2) if photo else 255.0
    noise = rng.normal(0, 4, (*down.shape, 3)) if photo else np.zeros((*down.shape, 3))
    image = Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, size = rng.integers(0, 600), rng.integers(0, 440), rng.integers(10, 90)
        color = tuple(rng.integers(0, 256, 3).tolist())
        pen.ellipse((x, y, x + size, y + size), outline=color, fill=color if photo else None, width=2)
        pen.line((x, y, *rng.integers(0, 480, 2).tolist()), fill=color, width=2)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if photo else "PNG", **({"quality": 90} if photo else {}))
    name = f"{number}.{'jpg' if photo else 'png'}"
    (folder / name).write_bytes(buffer.getvalue())
    return name


def decode_span(root: str, span: Span) -> int:
    """Read the rows of a span and decode their pictures."""
    read = row_reader("mm_eureka", root, None)
    for row, columns in read_span(span):
        if isinstance(columns, BadRowError):
            raise columns
        for data in read(columns, str(row)).images:
            open_image(data, _LIMIT)
    return span.num_rows


def decode(file: Path, jobs: int) -> int:
    """Number of rows decoded."""
    return sum(ordered_map(partial(decode_span, str(file.parent)), plan_spans([str(file)], jobs), jobs))


def prepare_file(file: Path, jobs: int) -> int:
    """Number of rows written."""
    options = PrepareOptions(
        files=(str(file),), format="mm_eureka", image_root=str(file.parent), jobs=jobs, split_by="question"
    )
    out = file.parent / "out"
    try:
        done = prepare(options, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return done.train_rows + done.test_rows


def measure(work: Callable[[Path, int], int], file: Path, jobs: int) -> Cost:
    """Run ``work`` in a fresh process, so that memory and processor time are its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(work, file, jobs, theirs))
    process.start()
    theirs.close()
    cost = ours.recv()
    process.join()
    return cost


def _measured(work: Callable[[Path, int], int], file: Path, jobs: int, pipe: Connection) -> None:
    start = time.perf_counter()
    work(file, jobs)
    wall = time.perf_counter() - start
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    peaks = (own.ru_maxrss << 10, children.ru_maxrss << 10)
    pipe.send(Cost(wall_s=wall, cpu_s=cpu, parent_peak_bytes=peaks[0], process_peak_bytes=peaks[1]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    works = {"decode": decode, "prepare": prepare_file}
    with tempfile.TemporaryDirectory() as folder:
        file = make_rows(Path(folder) / "all", options.rows)
        quarter = make_rows(Path(folder) / "quarter", options.rows // 4)
        costs: dict[str, list[Cost]] = {name: [] for name in works}
        for _ in range(options.repeats):
            for name, work in works.items():
                costs[name].append(measure(work, file, options.jobs))
        small = measure(prepare_file, quarter, options.jobs)
    best = {name: min(found, key=lambda cost: cost.wall_s) for name, found in costs.items()}
    least = {name: min(cost.cpu_s for cost in found) for name, found in costs.items()}
    result = {
        "rows": options.rows,
        "jobs": options.jobs,
        **{f"{name}_rows_per_s": round(options.rows / cost.wall_s, 1) for name, cost in best.items()},
        "ratio": round(best["decode"].wall_s / best["prepare"].wall_s, 3),
        "ratio_cpu": round(least["decode"] / least["prepare"], 3),
        "prepare": asdict(best["prepare"]),
        "decode": asdict(best["decode"]),
        "prepare_quarter_of_the_rows": asdict(small),
    }
    for key, value in result.items():
        print(f"{key}: {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
