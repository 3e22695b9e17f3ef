"""Fixtures that several unit tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PLUGIN = '''
import math, os, subprocess, sys, time

def behave(prompt, text):
    """Does what the text says; else the text's length."""
    if text == "sleep":
        time.sleep(1e6)
    if text == "spin":
        while True:
            pass
    if text == "bignum":
        9 ** (9 ** 9)
    if text == "raise":
        raise LookupError("no luck")
    if text == "exit":
        sys.exit(3)
    if text == "segfault":
        os.kill(os.getpid(), 11)
    if text == "memory":
        bytearray(9 << 30)
    if text == "print":
        print('{"id": 0, "value": {}}', flush=True)
    if text == "read":
        return float(len(sys.stdin.read()))
    if text == "torch":
        return float("torch" in sys.modules)
    if text == "prompt":
        return float(prompt.meta["bonus"]) + len(prompt.messages) + len(prompt.images)
    return {"nan": math.nan, "inf": math.inf, "none": None, "word": "1"}.get(text, float(len(text)))

def counted(prompt, text, *, path):
    with open(path, "a") as file:
        file.write(f"{prompt.id} {text}\\n")
    return 1.0

def once(prompt, text, *, path):
    """Fails when it is called for the first time."""
    open(path, "x" if not os.path.exists(path) else "r").read()
    return 1.0
'''


@pytest.fixture(scope="module")
def plugin_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("plugins")
    (directory / "odd_rewards.py").write_text(PLUGIN)
    (directory / "misspelt_rewards.py").write_text("def broken(:\n")
    (directory / "broken_rewards.py").write_text("def broken(prompt, text):\n    return 1.0\n\n1 / 0\n")
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))
