"""Workarounds for other packages, each with its reason and the version in which it was needed."""

from __future__ import annotations

import importlib.util
import sys


def declare_torchvision_ops() -> None:
    """Make ``import torchvision`` work with a CPU-only torch; does nothing where torchvision's own operators load.

    torchvision 0.28.0 as published on PyPI is linked against CUDA. Without CUDA its C++ library does not load, and
    the import ends at ``torchvision::nms`` (and ``::qnms``) because ``torchvision/_meta_registrations.py`` refers to
    operators that nobody has declared. Declared without a kernel they let the Python parts (transforms) be imported;
    calling one is still an error. To be called in every process before the first import of torchvision, which
    transformers' image processors and SGLang do. Safe to call again.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    import torch

    if torch.version.cuda is not None or _declared_library:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared_library.append(library)


_declared_library: list[object] = []  # a torch.library.Library undoes its definitions when it is collected


def keep_pandas_out() -> None:
    """Let ``import pandas`` fail in this process, if it has not been imported. For worker processes of our own.

    pyarrow (26.0) imports it when it first makes an array, to ask whether a list is a pandas Series: a second of
    processor time in every worker that has no other use for it.
    """
    sys.meta_path.insert(0, _NoPandas())


class _NoPandas:
    """Says of pandas that it cannot be imported. (Cython does not understand a None in ``sys.modules``.)"""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is kept out of this process", name=name)
