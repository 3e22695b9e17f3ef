"""Imported by Python itself at the start of the engine's processes in tests: notes every image file that is decoded."""

from __future__ import annotations

import os

from PIL import Image

_note = os.environ.get("IMAGE_DECODE_LOG")
_open = Image.open


def _noted_open(*args, **kwargs):
    with open(_note, "a") as file:
        file.write("decoded\n")
    return _open(*args, **kwargs)


if _note:
    Image.open = _noted_open
