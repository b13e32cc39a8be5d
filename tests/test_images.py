"""Pictures in, pictures out: every kind of file, every way it can be wrong, and no half-written output."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arimg import images
from arimg.errors import ArimgError, InputError, UnknownNameError


@pytest.fixture
def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fails(call, *parts: str, error: type[ArimgError] = InputError) -> None:
    """`call` raises `error` with one line that holds all `parts`."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Loading: kinds of pictures that are handled


def test_path_bytes_and_picture_give_the_same_pixels(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(photo), photo):
        loaded = images.load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.array(loaded), np.array(photo))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode):
    clear = Image.new(mode, (1, 1), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    half = Image.new(mode, (1, 1), (0, 0, 0, 128) if mode == "RGBA" else (0, 128))
    assert images.load_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert images.load_image(encoded(half)).getpixel((0, 0)) == (127, 127, 127)


def test_palette_and_its_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert [images.load_image(encoded(image)).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    see_through = images.load_image(encoded(image, transparency=0))
    assert [see_through.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


def test_16_bit_grey_keeps_its_shades():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    loaded = images.load_image(encoded(Image.fromarray(values)))
    assert [loaded.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_16_bit_colour_keeps_its_colours():
    rows = b"\x00" + struct.pack(">6H", 65535, 0, 32896, 257, 65535, 0)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks)
    loaded = images.load_image(png)
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 128), (1, 255, 0)]


def test_grey_bilevel_and_cmyk():
    assert images.load_image(encoded(Image.new("L", (1, 1), 7))).getpixel((0, 0)) == (7, 7, 7)
    assert images.load_image(encoded(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)
    cmyk = images.load_image(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))
    assert np.abs(np.array(cmyk.getpixel((4, 4))) - (0, 255, 255)).max() <= 2


def test_exif_rotation_is_applied(photo):
    exif = Image.Exif()
    exif[0x0112] = 6                                      # turn a quarter clockwise to show
    loaded = images.load_image(encoded(photo, exif=exif))
    np.testing.assert_array_equal(np.array(loaded), np.rot90(np.array(photo), -1))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    loaded = images.load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert loaded.getpixel((0, 0)) == (255, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Loading: what is refused


def test_missing_file(tmp_path):
    fails(lambda: images.load_image(tmp_path / "no.png", "control image"), "control image", "no.png", "does not exist")


def test_folder(tmp_path):
    fails(lambda: images.load_image(tmp_path), "is a folder")


def test_not_a_regular_file():
    fails(lambda: images.load_image(os.devnull), os.devnull, "not a regular file")


@pytest.mark.parametrize("source", ["", b""])
def test_empty_source(source, tmp_path):
    fails(lambda: images.load_image(source), "folder" if source == "" else "empty")


def test_empty_file(tmp_path):
    (tmp_path / "e.png").touch()
    fails(lambda: images.load_image(tmp_path / "e.png"), "e.png", "empty (0 bytes)")


@pytest.mark.parametrize("content", [b"hello, world\n" * 9, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_not_a_picture(tmp_path, content):
    (tmp_path / "notes.png").write_bytes(content)
    fails(lambda: images.load_image(tmp_path / "notes.png"), "notes.png", "not a picture")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated(tmp_path, kind, photo):
    data = encoded(photo.resize((300, 200)), kind)
    (tmp_path / "cut").write_bytes(data[:len(data) // 2])
    fails(lambda: images.load_image(tmp_path / "cut"), "cut")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_damaged_files_raise_nothing_else(kind, photo, recwarn):
    data = encoded(photo, kind)
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(0, min(200, damaged.size), 4)] = rng.integers(0, 256, 4)
        try:
            images.load_image(damaged.tobytes())
        except InputError as error:
            assert "\n" not in str(error)
    assert not recwarn.list


def forbid(path: Path, mode: str) -> None:
    """What `Path.open` does to a user without the permission (tests may run as root, who has every permission)."""
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_unreadable(tmp_path, photo, monkeypatch):
    photo.save(tmp_path / "a.png")
    monkeypatch.setattr(Path, "open", forbid)
    fails(lambda: images.load_image(tmp_path / "a.png"), "a.png", "Permission denied")


def test_name_that_the_system_refuses(tmp_path):
    fails(lambda: images.load_image(tmp_path / ("x" * 300)), "cannot be read", "too long")
    fails(lambda: images.load_image("a\0b.png"), "cannot be read", "null byte")


def test_bomb_names_pixels_and_limit(photo):
    fails(lambda: images.load_image(photo, max_pixels=599), "30x20", "600 pixels", "limit of 599")
    huge = encoded(Image.new("1", (20000, 10000)))        # 200 MP in 25 kB: beyond PIL's own limit
    fails(lambda: images.load_image(huge), "200000000 pixels", f"limit of {images.MAX_PIXELS}")
    large = encoded(Image.new("1", (10000, 10000)))       # 100 MP: PIL would only warn
    fails(lambda: images.load_image(large), "100000000 pixels", f"limit of {images.MAX_PIXELS}")


def test_unusable_values():
    fails(lambda: images.load_image(Image.new("F", (2, 2))), "floating-point", "PNG")
    fails(lambda: images.load_image(Image.new("I", (1, 1), 70000)), "70000", "65535")
    fails(lambda: images.load_image(Image.new("RGB", (0, 5))), "no pixels (0x5)")
    fails(lambda: images.load_image(np.zeros((2, 2, 3))), "ndarray", "PIL picture")          # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Fitting


def test_fit_leaves_the_right_size_untouched(photo):
    for mode in images.RESIZE_MODES:
        assert images.fit(photo, (20, 30), mode) is photo


@pytest.mark.parametrize("mode", images.RESIZE_MODES)
@pytest.mark.parametrize("size", [(16, 16), (64, 16), (16, 64), (1, 1)])
@pytest.mark.parametrize("shape", [(20, 30), (1, 500), (500, 1), (1, 1)])
def test_fit_gives_the_size(mode, size, shape):
    fitted = images.fit(Image.new("RGB", (shape[1], shape[0])), size, mode)
    assert (fitted.height, fitted.width) == size


def test_pad_centres_on_the_background():
    fitted = np.array(images.fit(Image.new("RGB", (20, 10), "white"), (40, 40), "pad", "nearest", (9, 8, 7)))
    assert (fitted[:10] == (9, 8, 7)).all() and (fitted[30:] == (9, 8, 7)).all()
    assert (fitted[10:30] == 255).all()


def test_crop_cuts_both_sides_alike():
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (10, 0, 30, 20))
    assert (np.array(images.fit(image, (20, 20), "crop", "nearest")) == 255).all()


def test_stretch_keeps_everything():
    image = Image.new("RGB", (4, 1), "black")
    image.paste("white", (2, 0, 4, 1))
    fitted = np.array(images.fit(image, (8, 8), "stretch", "nearest"))
    assert (fitted[:, :4] == 0).all() and (fitted[:, 4:] == 255).all()


def test_nearest_makes_no_new_colours(photo):
    two = Image.fromarray(np.where(np.array(photo) > 127, 255, 0).astype(np.uint8))
    assert set(np.unique(np.array(images.fit(two, (33, 47), "stretch", "nearest")))) <= {0, 255}
    assert len(np.unique(np.array(images.fit(two, (33, 47), "stretch", "bicubic")))) > 2


def test_fit_refuses_unknown_modes(photo):
    fails(lambda: images.fit(photo, (8, 8), "padd"), "did you mean pad", error=UnknownNameError)
    fails(lambda: images.fit(photo, (8, 8), resample="bicubik"), "did you mean bicubic", error=UnknownNameError)
    fails(lambda: images.fit(photo, (0, 8)), "0x8")


def test_adm_crop_halves_with_a_box_then_scales_the_short_side():
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (64, 100, 3), dtype=np.uint8))
    halved = np.array(image).reshape(32, 2, 50, 2, 3).mean(axis=(1, 3))
    cropped = np.array(images.center_crop_adm(image, 32))
    assert cropped.shape == (32, 32, 3)
    assert np.abs(cropped - halved[:, 9:41]).max() <= 1
    assert images.center_crop_adm(Image.new("RGB", (31, 57)), 32).size == (32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def test_tensors_are_in_minus_one_to_one_and_go_back_exactly():
    every = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2))
    tensor = images.to_tensor(every)
    assert tensor.shape == (3, 1, 256) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    torch.testing.assert_close(tensor[0, 0], 2 * torch.arange(256) / 255 - 1)
    np.testing.assert_array_equal(np.array(images.to_pil(tensor)), np.array(every))


def test_to_pil_clips_and_truncates_as_llamagen():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.0039, 1.0, 2.0]).expand(3, 1, 6)
    expected = (127.5 * values + 128).clamp(0, 255).to(torch.uint8)
    np.testing.assert_array_equal(np.array(images.to_pil(values)), expected.permute(1, 2, 0).numpy())
    assert images.to_pil(torch.zeros(3, 2, 5, dtype=torch.bfloat16)).size == (5, 2)


def test_grid_is_near_square_with_gaps():
    colours = ["red", "green", "blue", "white", "black"]
    grid = images.make_grid([Image.new("RGB", (4, 3), colour) for colour in colours], gap=1)
    assert grid.size == (3 * 5 - 1, 2 * 4 - 1)
    assert grid.getpixel((5, 0)) == (0, 128, 0) and grid.getpixel((5, 4)) == (0, 0, 0)
    assert grid.getpixel((4, 0)) == (255, 255, 255)


def test_grid_of_one_of_none_and_of_two_sizes(photo):
    assert images.make_grid([photo]) is photo
    fails(lambda: images.make_grid([]), "0 pictures")
    fails(lambda: images.make_grid([photo, photo.resize((5, 5))]), "30x20", "5x5")


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.JPEG"])
def test_saved_metadata_comes_back(name, photo, tmp_path):
    metadata = {"seed": 3, "prompt": "ein Bär, 熊", "controls": [{"type": "canny", "scale": 0.5}], "class": None}
    images.save_image(photo, tmp_path / name, metadata)
    assert images.read_metadata(tmp_path / name) == metadata
    assert images.load_image(tmp_path / name).size == photo.size
    assert os.listdir(tmp_path) == [name]


def test_png_metadata_is_a_text_chunk(photo, tmp_path):
    images.save_image(photo, tmp_path / "a.png", {"seed": 3})
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"arimg": '{"seed": 3}'}


def test_format_beats_suffix(photo, tmp_path):
    images.save_image(photo, tmp_path / "a.png", format="webp")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "WEBP"


@pytest.mark.parametrize("text, part", [(None, "carries no arimg metadata"), ("{", "damaged"), ("[1]", "damaged")])
def test_metadata_absent_or_damaged(text, part, photo, tmp_path):
    images.save_image(photo, tmp_path / "a.png")
    if text is not None:
        exif = Image.Exif()
        exif[0x010E] = text
        photo.save(tmp_path / "a.png", exif=exif)
    fails(lambda: images.read_metadata(tmp_path / "a.png"), "a.png", part)


def test_unknown_suffix_and_format(photo, tmp_path):
    fails(lambda: images.save_image(photo, tmp_path / "a.bmp"), "'.bmp'", ".png, .webp, .jpg, .jpeg")
    fails(lambda: images.save_image(photo, tmp_path / "a"), "''", ".png")
    fails(lambda: images.save_image(photo, tmp_path / "a.png", format="jpg"), "jpeg", error=UnknownNameError)
    assert not os.listdir(tmp_path)


def test_output_places_that_cannot_be(photo, tmp_path):
    fails(lambda: images.save_image(photo, tmp_path / "no" / "a.png"), "does not exist", "mkdir -p")
    (tmp_path / "d.png").mkdir()
    fails(lambda: images.save_image(photo, tmp_path / "d.png"), "is a folder")
    fails(lambda: images.save_image(photo, os.devnull, format="png"), "not a regular file")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / "file").touch()
    fails(lambda: images.save_image(photo, tmp_path / "file" / "a.png"), "file", "is not a folder")
    fails(lambda: images.save_image(photo, tmp_path / ("x" * 300 + ".png")), "cannot be written")


def test_check_output_before_the_work(tmp_path):
    assert images.check_output(tmp_path / "a.JPG") == "jpeg"
    assert images.check_output(tmp_path / "a", "png") == "png"
    fails(lambda: images.check_output(tmp_path / "no" / "a.png"), "does not exist")


def test_unwritable_folder(photo, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "open", forbid)
    fails(lambda: images.save_image(photo, tmp_path / "a.png"), "Permission denied")


def test_picture_too_large_for_the_format(tmp_path):
    fails(lambda: images.save_image(Image.new("RGB", (20000, 1)), tmp_path / "a.webp"), "20000x1", "webp", "use png")
    fails(lambda: images.save_image(Image.new("RGBA", (1, 1)), tmp_path / "a.jpg"), "RGBA", "use png")
    assert not os.listdir(tmp_path)


class BrokenStream(io.BytesIO):
    """A file whose disk is full, or whose user presses Ctrl-C."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__()
        self.failure = failure

    def write(self, data) -> int:
        raise self.failure


@pytest.mark.parametrize("moment", ["write", "rename"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_stays(photo, tmp_path, monkeypatch, moment, failure):
    (tmp_path / "a.png").write_bytes(b"old")
    if moment == "write":
        def broken_open(path: Path, mode: str) -> BrokenStream:
            open(path, mode).close()
            return BrokenStream(failure)

        monkeypatch.setattr(Path, "open", broken_open)
    else:
        def broken_replace(source, target) -> None:
            raise failure

        monkeypatch.setattr(os, "replace", broken_replace)
    if isinstance(failure, OSError):
        fails(lambda: images.save_image(photo, tmp_path / "a.png"), "a.png", "No space left", "free space")
    else:
        with pytest.raises(KeyboardInterrupt):
            images.save_image(photo, tmp_path / "a.png")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_saved_files_have_the_usual_permissions(photo, tmp_path):
    images.save_image(photo, tmp_path / "a.png")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode
