"""Write requirements/cuda-lock.txt: every package of a machine with GPUs, with the checksum of the one file to install.

uv resolves requirements/cuda.txt, as it can replace pins of other packages (requirements/cuda-overrides.txt), which pip
cannot; pip says which file of each version fits Python 3.12 on x86-64 Linux, and its checksum. Nothing is installed.

  python3.12 -m venv lock && lock/bin/pip install uv && lock/bin/python tools/lock_cuda.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
HEAD = """\
# Made by tools/lock_cuda.py from cuda.txt and cuda-overrides.txt for Python 3.12 on x86-64 Linux; do not edit.
#   pip install --no-deps --require-hashes -r requirements/cuda-lock.txt
"""


def main() -> None:
    """Resolve, look up, write."""
    if sys.version_info[:2] != (3, 12) or not sys.platform.startswith("linux"):
        sys.exit(f"error: run this with Python 3.12 on Linux, as in the image; this is {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as directory:
        pins, report = Path(directory, "pins.txt"), Path(directory, "report.json")
        resolve = ["uv", "pip", "compile", "--no-config", "--no-build", "--no-annotate", "--no-header", "--quiet"]
        overrides = ["--override", str(REQUIREMENTS / "cuda-overrides.txt")]
        run([*resolve, *overrides, "--python", sys.executable, "-o", str(pins), str(REQUIREMENTS / "cuda.txt")])
        look_up = ["pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--quiet"]
        run([*look_up, "--report", str(report), "-r", str(pins)])
        lines = sorted(line(package) for package in json.loads(report.read_text(encoding="utf-8"))["install"])
    (REQUIREMENTS / "cuda-lock.txt").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


def run(module: list[str]) -> None:
    """``python -m`` the words of ``module``."""
    subprocess.run([sys.executable, "-m", *module], check=True)


def line(package: dict) -> str:
    """One line of the lock, from pip's report about a package."""
    metadata = package["metadata"]
    checksum = package["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{metadata['name'].lower().replace('_', '-')}=={metadata['version']} --hash=sha256:{checksum}"


if __name__ == "__main__":
    main()
