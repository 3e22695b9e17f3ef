"""Image files are opened only below the root and decoded only when they are small, whole and known."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mmrl.data.errors import BadImageError, BadRowError
from megatron_mmrl.data.images import content_hash, open_image, pixel_hash, read_image, to_png
from tests.unit.data_rows import bomb, encoded, picture

LIMIT = 10_000


def test_png_without_loss_and_other_formats_decode() -> None:
    image = picture(30, 20)
    again = open_image(to_png(image), LIMIT)
    assert again.mode == "RGB"
    assert np.array_equal(np.asarray(again), np.asarray(image))
    for kind in ("JPEG", "WEBP", "GIF", "BMP"):
        assert open_image(encoded(image, kind), LIMIT).size == (30, 20)


def test_grey_palette_and_alpha_become_rgb() -> None:
    for mode in ("L", "P", "LA", "RGBA", "1"):
        assert open_image(encoded(picture(5, 4).convert(mode)), LIMIT).mode == "RGB"


def test_exif_orientation_is_applied() -> None:
    image = picture(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert open_image(buffer.getvalue(), LIMIT).size == (20, 30)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<svg></svg>", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        (encoded(picture())[:-500], "cannot be decoded"),
        (encoded(picture(), "JPEG")[:-300], "cannot be decoded"),
        (bomb(40_000, 40_000), "1600000000 pixels"),  # above PIL's own limit
        (bomb(10_000, 10_000), "100000000"),  # PIL only warns here
        (bomb(101, 100), "101 x 100 = 10100 pixels, more than data.max_decoded_pixels=10000"),
        (encoded(Image.fromarray(np.full((4, 4), 60_000, dtype=np.uint16))), "more than 8 bits"),
    ],
    ids=["zero-byte", "svg", "eps", "truncated-png", "truncated-jpeg", "bomb", "warning", "limit", "16-bit"],
)
def test_what_is_no_good_image_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        open_image(data, LIMIT)


def test_any_damage_is_a_bad_image_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        whole = encoded(picture(12, 10), kind)
        damaged = [whole[:length] for length in range(0, len(whole), max(1, len(whole) // 40))]
        for _ in range(100):
            spoiled = bytearray(whole)
            spoiled[rng.integers(0, min(len(whole), 200))] = rng.integers(0, 256)
            damaged.append(bytes(spoiled))
        for data in damaged:
            try:
                assert open_image(data, LIMIT).mode == "RGB"
            except BadImageError:
                refused += 1
    assert refused > 200


def test_one_picture_in_many_files_has_one_hash() -> None:
    image = picture(30, 20).convert("L").convert("RGB")
    files = [encoded(image, kind) for kind in ("PNG", "BMP", "GIF")]
    files += [encoded(image.convert(mode)) for mode in ("L", "LA", "RGBA")]
    assert len(set(files)) == len(files)
    (same,) = {pixel_hash(open_image(data, LIMIT)) for data in files}
    changed = image.copy()
    changed.putpixel((29, 19), (1, 2, 3))
    turned = Image.frombytes("RGB", (20, 30), image.tobytes())
    assert len({same, pixel_hash(changed), pixel_hash(turned)}) == 3


def test_large_pictures_are_hashed_too() -> None:
    """PIL holds them in several blocks."""
    image = Image.new("RGB", (6000, 5000), "red")
    assert pixel_hash(image) == pixel_hash(image.copy())
    other = image.copy()
    other.putpixel((5999, 4999), (0, 0, 0))
    assert pixel_hash(other) != pixel_hash(image)


def test_bytes_of_a_row_are_taken_as_they_are() -> None:
    assert read_image({"bytes": b"abc", "path": "ignored.png"}, None) == b"abc"
    assert content_hash(b"abc") == content_hash(b"".join([b"ab", b"c"])) != content_hash(b"abd")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (root / "sub/a.png").write_bytes(b"good")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "images_of_others").mkdir()
    (tmp_path / "images_of_others/b.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "inner.png").symlink_to(root / "sub/a.png")
    os.mkfifo(root / "pipe.png")
    return root


def test_paths_below_the_root_are_read(root: Path) -> None:
    for path in ("sub/a.png", f"file://{root}/sub/a.png", f"{root}/sub/a.png", "sub/../sub/a.png", "inner.png"):
        assert read_image({"path": path}, str(root)) == b"good"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "outside data.image_root"),
        ("/etc/passwd", "outside data.image_root"),
        ("file:///etc/passwd", "outside data.image_root"),
        ("../images_of_others/b.png", "outside data.image_root"),  # the root's name is a prefix of this one's
        ("link.png", "outside data.image_root"),
        ("loop.png", "loop.png"),
        ("missing.png", "no such file"),
        ("sub", "no such file"),
        ("pipe.png", "no such file"),  # reading it would wait for ever
        ("a\0b.png", "cannot be read"),
        ("http://127.0.0.1/a.png", "no image is fetched in a run"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_all_other_paths_are_refused(root: Path, path: str, reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        read_image({"path": path}, str(root))


def test_without_a_root_no_path_is_opened(root: Path) -> None:
    with pytest.raises(BadRowError, match="image_root is not set"):
        read_image({"path": str(root / "sub/a.png")}, None)


@pytest.mark.parametrize("entry", [{}, {"bytes": None, "path": None}, {"image": "a.png"}, "a.png", None])
def test_entries_without_an_image_are_refused(entry: object) -> None:
    with pytest.raises(BadRowError, match="image"):
        read_image(entry, "/")
