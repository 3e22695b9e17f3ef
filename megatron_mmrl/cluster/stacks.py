"""What the threads of this process are doing, as text."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

from megatron_mmrl.pulse import awaits_others, in_collective, main_frame


def all_stacks() -> str:
    """The Python stacks of all threads, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    parts = []
    for ident, frame in frames:
        parts.append(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def main_thread_waits() -> bool:
    """Whether the main thread waits for other ranks."""
    return awaits_others(main_frame())


def main_thread_does() -> str:
    """The main thread's innermost line, or the call that waits for other ranks and the line that made it."""
    frame: FrameType = main_frame()
    call = ""
    while in_collective(frame.f_code) and frame.f_back is not None:
        call = call if frame.f_code.co_name == "wrapper" else frame.f_code.co_name  # torch wraps all for its logger
        frame = frame.f_back
    line = f"{_short(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"
    return f"{call} called at {line}" if call else line


def _short(filename: str) -> str:
    """The last parts of a path: enough to find the file."""
    return "/".join(Path(filename).parts[-3:])
