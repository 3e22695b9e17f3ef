"""Image files from rows: opened only where allowed, decoded only when small enough, never trusted."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import xxhash
from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_mmrl.data.errors import BadImageError, BadRowError

# PIL knows some forty formats; a few start other programs (EPS), many are never tested against hostile files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_FILE_BYTES = 256 << 20
_DECODE_ERRORS = (
    OSError,  # truncated, not an image
    SyntaxError,  # PIL's word for a broken PNG chunk
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def read_image(entry: object, image_root: str | None, fetch: Callable[[str], bytes] | None = None) -> bytes:
    """The encoded image of one entry of a row's ``images``.

    Args:
        entry: ``{"bytes": ...}`` or ``{"path": ...}``; where both are set the bytes count. A path may begin with
            ``file://``; a relative one is taken from ``image_root``.
        image_root: the only directory below which paths are opened, symbolic links followed.
        fetch: gets a path that is an http or https address; None: such paths are refused.

    Raises:
        BadRowError: no bytes and no path, path outside the root, file missing or not a plain file, an address that
            ``fetch`` refuses.
    """
    if not isinstance(entry, Mapping):
        raise BadRowError(f"an image must be a mapping with 'bytes' or 'path', not {type(entry).__name__}")
    data, path = entry.get("bytes"), entry.get("path")
    if isinstance(data, bytes):
        return data
    if not isinstance(path, str) or not path:
        raise BadRowError(f"an image has neither 'bytes' nor 'path'; its keys are {sorted(map(str, entry))}")
    if path.lower().startswith(("http://", "https://")):
        if fetch is None:
            raise BadRowError(
                f"image path {path!r:.200}: no image is fetched in a run; mmrl data prepare --allow-http embeds them"
            )
        return fetch(path)
    if image_root is None:
        raise BadRowError(f"image path {path!r:.200}: data.image_root is not set, so only image bytes are accepted")
    return _read_below(path.removeprefix("file://"), Path(image_root).resolve())


def _read_below(path: str, root: Path) -> bytes:
    try:
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise BadRowError(f"image path {path!r:.200} leads outside data.image_root={root}")
        if not file.is_file():  # missing, but also a directory, a pipe or a device
            raise BadRowError(f"image path {path!r:.200}: no such file below data.image_root={root}")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise BadRowError(f"image path {path!r:.200}: {file.stat().st_size} bytes, more than {MAX_FILE_BYTES}")
        return file.read_bytes()
    except BadRowError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # unreadable; a loop of links; a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error  # without the path again
        raise BadRowError(f"image path {path!r:.200} cannot be read: {reason}") from error


def open_image(data: bytes, max_decoded_pixels: int) -> Image.Image:
    """Decode an image file to RGB, the first frame, turned as its EXIF orientation says.

    The header's size is compared with ``max_decoded_pixels`` before a pixel is decoded.

    Raises:
        BadImageError: zero bytes, not an image, truncated, more pixels than allowed, more than 8 bits per channel.
    """
    if not data:
        raise BadImageError("image has zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_decoded_pixels:
                raise BadImageError(
                    f"image claims {width} x {height} = {width * height} pixels, "
                    f"more than data.max_decoded_pixels={max_decoded_pixels}"
                )
            if image.mode[0] in "IF":  # converted to RGB these would be clipped to white without a word
                raise BadImageError(f"image has mode {image.mode} (more than 8 bits per channel); save it with 8 bits")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == "RGB" else image.convert("RGB")
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"{len(data)} bytes that are no image; known formats: {', '.join(FORMATS)}") from error
    except _DECODE_ERRORS as error:
        raise BadImageError(f"image of {len(data)} bytes cannot be decoded: {error or type(error).__name__}") from error


def to_png(image: Image.Image) -> bytes:
    """Encode without loss; fast rather than small."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def content_hash(data: bytes) -> str:
    """Equal for equal bytes, whatever row or file they came from."""
    return hashlib.sha256(data).hexdigest()


def pixel_hash(image: Image.Image) -> int:
    """64-bit hash of the size and the pixels of an RGB image: equal for one picture in two files.

    PIL's memory is hashed where it lies, four bytes a pixel; to copy it out would cost as much as half of decoding it.
    """
    try:
        pixels = pa.array(image).values.buffers()[1]
    except ValueError:  # of an image above 16 MiB, which PIL holds in several blocks
        pixels = image.tobytes("raw", "RGBX")
    return xxhash.xxh3_64_intdigest(pixels, seed=image.width)
