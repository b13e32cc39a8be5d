"""The emoji builder on four toy packages: unpacked and packed, whole and damaged."""
from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("resvg_py")

from PIL import Image  # noqa: E402

from arimg.data import load_emoji  # noqa: E402
from arimg.errors import InputError  # noqa: E402
from arimg.train import emoji  # noqa: E402

SIZE = 16
CHARS = {"1f436": "dog", "1f44b": "wave", "1f44b-1f3fd": "wave-medium", "1f354": "burger"}
CATEGORIES = {"Animals & Nature": ["dog"], "People & Body": ["wave", "wave-medium"], "Food & Drink": ["burger"]}


def square(color: str) -> dict:
    return {"body": f'<path fill="{color}" d="M2 2h6v9H2z"/>'}


def iconify(shade: str) -> dict[str, bytes]:
    """Four current icons, two hidden ones (an older dog, a component), one plain and one flipped alias."""
    icons = {name: square(f"#{shade}{n}0") for n, name in enumerate(CHARS.values(), start=1)}
    icons["dog-tone3"] = {**square(f"#{shade}88"), "hidden": True}
    icons["bald"] = {**square(f"#{shade}99"), "hidden": True}
    aliases = {"puppy": {"parent": "dog"}, "wave-dark": {"parent": "wave", "hFlip": True}}
    files = {"icons.json": {"icons": icons, "aliases": aliases, "width": 16, "height": 16},
             "chars.json": CHARS, "metadata.json": {"categories": CATEGORIES}}
    return {path: json.dumps(content).encode() for path, content in files.items()}


def webp(color: tuple[int, int, int, int]) -> bytes:
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    picture.paste(color, (8, 8, 24, 24))
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True)
    return file.getvalue()


def packages() -> dict[str, dict[str, bytes]]:
    """Package name -> files."""
    content = {"noto": iconify("a"), "twemoji": iconify("b"), "fluent": iconify("c")}
    content["fluent3d"] = {
        "assets/1f436.webp": webp((255, 0, 0, 255)), "assets/1f44b-1f3ff.webp": webp((0, 255, 0, 255)),
        "assets/1f354-fe0f.webp": webp((0, 0, 255, 255)), "assets/1f43a.webp": webp((9, 9, 9, 255)),
    }
    for style, files in content.items():
        about = {"name": emoji.PACKAGES[style], "version": "1.2.3", "license": "MIT"}
        files["package.json"] = json.dumps(about).encode()
    return {emoji.PACKAGES[style]: files for style, files in content.items()}


def write_folders(root: Path, content: dict[str, dict[str, bytes]]) -> Path:
    for name, files in content.items():
        for path, data in files.items():
            target = root / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    return root


def write_tarballs(root: Path, content: dict[str, dict[str, bytes]]) -> Path:
    root.mkdir()
    for name, files in content.items():
        with tarfile.open(root / f"{name.lstrip('@').replace('/', '-')}-1.2.3.tgz", "w:gz") as tar:
            for path, data in {**files, "../../escape.json": b"{}"}.items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return root


def read_index(folder: Path) -> dict:
    return json.loads((folder / "index.json").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("emoji")
    return emoji.build_emoji(root / "out", write_folders(root / "source", packages()), SIZE, progress=False)


def test_loads_what_was_built(built: Path) -> None:
    loaded = load_emoji(built)
    assert loaded.images.shape == (len(loaded.names), SIZE, SIZE, 3) and loaded.images.dtype == np.uint8
    assert isinstance(loaded.images, np.memmap) and not loaded.images.flags.writeable
    assert loaded.labels.dtype == np.int64 and loaded.held_out.dtype == bool
    assert loaded.class_names == emoji.CLASS_NAMES
    dog = loaded.names.index("dog")
    assert loaded.images[dog, 5, 4].tolist() == [0xAA, 0x11, 0x00]
    assert loaded.images[dog, 0, 0].tolist() == [255, 255, 255]


def test_classes(built: Path) -> None:
    assert len(emoji.CLASS_NAMES) == 36
    assert emoji.CLASS_NAMES[0] == "noto/smileys" and emoji.CLASS_NAMES[-1] == "fluent3d/flags"
    loaded = load_emoji(built)
    classes = {name: emoji.CLASS_NAMES[label] for name, label in zip(loaded.names, loaded.labels)}
    assert classes["1f436"] == "fluent3d/animals"
    assert classes["1f354-fe0f"] == "fluent3d/food"
    assert classes["1f44b-1f3ff"] == "fluent3d/people", "a skin tone no other package has: by its key"
    assert read_index(built)["counts"]["classes"]["twemoji/people"] == 3


def test_index_accounts_for_every_icon(built: Path) -> None:
    index = read_index(built)
    counts = index["counts"]
    assert counts["ungrouped"] == ["noto/bald", "twemoji/bald", "fluent/bald", "fluent3d/1f43a"]
    assert counts["aliases"] == 3 and counts["broken"] == [] and counts["duplicates"] == 0
    assert counts["styles"] == {"noto": 6, "twemoji": 6, "fluent": 6, "fluent3d": 3}
    assert counts["images"] == len(index["items"]) == 21
    assert index["packages"][0] == {"name": "@iconify-json/noto", "version": "1.2.3", "licence": "MIT"}


def test_flipped_alias_is_the_mirror_image(built: Path) -> None:
    loaded = load_emoji(built)
    wave, mirrored = (loaded.images[loaded.names.index(name)] for name in ("wave", "wave-dark"))
    np.testing.assert_array_equal(wave[:, ::-1], mirrored)


def test_all_guises_of_an_emoji_are_on_one_side(built: Path) -> None:
    sides, styles = defaultdict(set), defaultdict(set)
    for item in read_index(built)["items"]:
        sides[item["key"]].add(item["split"])
        styles[item["key"]].add(item["style"])
    assert set(sides) == {"1f436", "1f44b", "1f354"}
    assert all(len(side) == 1 for side in sides.values())
    assert all(len(style) == 4 for style in styles.values())


@pytest.mark.parametrize("key, guises", [
    ("1f44b", ["1f44b", "1F44B-1F3FB", "1f44b-1f3ff"]),
    ("1f9d1-1f680", ["1f9d1-200d-1f680", "1f468-1f3fd-200d-1f680", "1f469-200d-1f680"]),
    ("1f3c3", ["1f3c3", "1f3c3-1f3fe-200d-2640-fe0f", "1f3c3-200d-2642-fe0f-200d-27a1-fe0f"]),
    ("1f46a", ["1f46a", "1f468-200d-1f469-200d-1f466", "1f9d1-200d-1f9d2"]),
    ("1f46b", ["1f46b", "1f46c", "1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff"]),
    ("1f48f", ["1f48f", "1f469-200d-2764-fe0f-200d-1f48b-200d-1f469"]),
    ("23-20e3", ["0023-fe0f-20e3", "23-20e3"]),
    ("1f3f4-e0067-e0062", ["1f3f4-e0067-e0062", "1f3f4-e0067-e0062-e007f"]),
    ("2640", ["2640", "2640-fe0f"]),
    ("27a1", ["27a1-fe0f"]),
    ("1f3fb", ["1f3fb", "1f3ff"]),
])
def test_key(key: str, guises: list[str]) -> None:
    assert {emoji.emoji_key(guise) for guise in guises} == {key}


def test_one_emoji_in_ten_is_held_out() -> None:
    held_out = sum(emoji.is_held_out(f"{0x1F300 + n:x}") for n in range(2000))
    assert 160 < held_out < 240


def test_tarballs_give_the_same_data_set(built: Path, tmp_path: Path) -> None:
    out = emoji.build_emoji(tmp_path / "out", write_tarballs(tmp_path / "source", packages()), SIZE, progress=False)
    assert read_index(out) == read_index(built)
    assert (out / "images.npy").read_bytes() == (built / "images.npy").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["images.npy", "index.json"]
    assert not list(tmp_path.parent.rglob("escape.json"))


def test_process_pool_gives_the_same_pixels(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "_POOL_FROM", 1)
    out = emoji.build_emoji(tmp_path / "out", write_folders(tmp_path / "source", packages()), SIZE, progress=False)
    assert (out / "images.npy").read_bytes() == (built / "images.npy").read_bytes()


def test_broken_blank_and_repeated_pictures_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = packages()
    icons = json.loads(content["@iconify-json/noto"]["icons.json"])
    icons["icons"]["dog"] = {"body": "<path"}
    icons["icons"]["burger"] = {"body": ""}
    icons["icons"]["dog-tone3"] = icons["icons"]["wave"]
    content["@iconify-json/noto"]["icons.json"] = json.dumps(icons).encode()
    content["@lobehub/fluent-emoji-3d"]["assets/1f436.webp"] = b"not a picture"
    out = emoji.build_emoji(tmp_path / "out", write_folders(tmp_path / "source", content), SIZE, progress=False)
    counts = read_index(out)["counts"]
    assert counts["broken"] == ["noto/dog", "noto/burger", "fluent3d/1f436"] and counts["duplicates"] == 1
    assert counts["images"] == len(load_emoji(out).images) == 21 - 4
    assert "3 broken noto/dog noto/burger fluent3d/1f436" in capsys.readouterr().err


def test_rebuild_does_nothing_until_something_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_folders(tmp_path / "source", packages()), tmp_path / "out"
    emoji.build_emoji(out, source, SIZE, progress=False)
    written = (out / "images.npy").stat().st_mtime_ns
    assert emoji.build_emoji(out, source, SIZE, progress=False) == emoji.build_emoji(out, None, SIZE) == out
    assert (out / "images.npy").stat().st_mtime_ns == written
    assert capsys.readouterr().err.count("nothing to do") == 2
    emoji.build_emoji(out, source, 2 * SIZE, progress=False)
    assert load_emoji(out).images.shape[1:] == (2 * SIZE, 2 * SIZE, 3)


def test_failed_build_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji, "_render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        emoji.build_emoji(tmp_path / "out", write_folders(tmp_path / "source", packages()), SIZE, progress=False)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(InputError, match="no complete emoji data set.*arimg data emoji"):
        load_emoji(tmp_path / "out")


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        emoji.build_emoji(tmp_path / "out", tmp_path / "nowhere", SIZE)
    with pytest.raises(InputError, match="@iconify-json/noto not found; run `npm pack"):
        emoji.build_emoji(tmp_path / "out", tmp_path, SIZE)
    assert not (tmp_path / "out").exists()


def test_missing_npm_names_the_source_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    monkeypatch.setattr(emoji.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="npm not found.*--source DIR"):
        emoji.build_emoji(tmp_path / "out", None, SIZE)


@pytest.mark.parametrize("damage", [b"{", b"{}"])
def test_damaged_package_is_named(tmp_path: Path, damage: bytes) -> None:
    content = packages()
    content["@iconify-json/twemoji"]["metadata.json"] = damage
    with pytest.raises(InputError, match="@iconify-json/twemoji: metadata.json is missing or damaged"):
        emoji.build_emoji(tmp_path / "out", write_folders(tmp_path / "source", content), SIZE)


def test_newest_tarball_wins(tmp_path: Path) -> None:
    for version in ("1.9.0", "1.10.0"):
        (tmp_path / f"iconify-json-noto-{version}.tgz").touch()
    assert emoji._tarballs(tmp_path, "@iconify-json/noto")[-1].name == "iconify-json-noto-1.10.0.tgz"
    with pytest.raises(InputError, match="1.10.0.tgz: not a readable .tgz"):
        emoji._find_package(tmp_path, "@iconify-json/noto")
