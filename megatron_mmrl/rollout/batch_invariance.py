"""Does a row of a matrix product depend on the rows beside it? Deterministic sampling needs that it does not."""

from __future__ import annotations

import multiprocessing

_SHAPES = ((128, 320), (320, 128), (1176, 64))  # (K, N): wide, narrow, and the patch embedding's
_ROW_COUNTS = (1, 2, 3, 8, 17, 64)


def require_independent_rows(dtype: str) -> None:
    """Check on this machine, in this environment, that rows of a product have the same bits in any batch.

    The check runs in a child process, so that the threads of the matrix library do not start in this one, which may
    fork later.

    Args:
        dtype: "float32" or "bfloat16".

    Raises:
        RuntimeError: rows depend on the batch.
    """
    child = multiprocessing.get_context("fork").Process(target=_exit_with_verdict, args=(dtype,))
    child.start()
    child.join()
    if child.exitcode != 0:
        raise RuntimeError(
            f"rollout.deterministic=true needs matrix products whose rows do not depend on the batch, and in {dtype} "
            "this machine has none: use model.dtype=float32 on an x86 CPU, where MKL_CBWR=AVX2,STRICT gives them, "
            "or a GPU"
        )


def rows_are_independent(dtype: str) -> bool:
    """Whether ``x @ w.T`` gives each row of x the same bits alone, in a batch, and at any place in it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for inner, outer in _SHAPES:
        x, weight = (torch.randn(n, inner, generator=generator).to(getattr(torch, dtype)) for n in (96, outer))
        whole = torch.nn.functional.linear(x, weight)
        for rows in _ROW_COUNTS:
            for start in (0, 5):
                part = torch.nn.functional.linear(x[start : start + rows].contiguous(), weight)
                if not torch.equal(part, whole[start : start + rows]):
                    return False
    return True


def _exit_with_verdict(dtype: str) -> None:
    raise SystemExit(0 if rows_are_independent(dtype) else 1)
