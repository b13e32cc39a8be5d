"""The emoji data set: four npm packages in, one memory-mapped array of pictures with labels and a split out.

A *style* is a package, a *group* one of Unicode's nine emoji groups, a *class* their product (`noto/animals`). A *key*
names an emoji beyond style, skin tone and gender; the split goes by key: no held-out emoji is seen in training.
"""
from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from arimg.data import open_emoji
from arimg.errors import InputError, MissingExtraError
from arimg.home import arimg_home

PACKAGES = {                                              # style -> npm package
    "noto": "@iconify-json/noto",                         # Apache-2.0
    "twemoji": "@iconify-json/twemoji",                   # CC-BY-4.0
    "fluent": "@iconify-json/fluent-emoji-flat",          # MIT
    "fluent3d": "@lobehub/fluent-emoji-3d",               # MIT, WebP files named by code points
}
GROUPS = {                                                # slug -> Unicode emoji group
    "smileys": "Smileys & Emotion", "people": "People & Body", "animals": "Animals & Nature",
    "food": "Food & Drink", "travel": "Travel & Places", "activities": "Activities",
    "objects": "Objects", "symbols": "Symbols", "flags": "Flags",
}
CLASS_NAMES = tuple(f"{style}/{group}" for style in PACKAGES for group in GROUPS)      # index = class id
HELD_OUT_PERCENT = 10
FORMAT = 1                                                # raised when the same packages would give another data set

_POOL_FROM = 64                                           # fewer renders than this are done in the calling process
_ZWJ, _VARIATION = 0x200D, 0xFE0F
_DROPPED = {_ZWJ, 0xE007F, *range(0x1F3FB, 0x1F400)}      # joiner, end of a regional flag, skin tones
_GENDER_OR_DIRECTION = {0x2640, 0x2642, 0x27A1}           # only where a ZWJ precedes; alone they are emoji
_NEUTRAL = {                                              # gendered code point -> gender-neutral code point
    0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1, 0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2, 0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3,
    0x1F934: 0x1FAC5, 0x1F478: 0x1FAC5, 0x1F930: 0x1FAC4, 0x1FAC3: 0x1FAC4, 0x1F57A: 0x1F483, 0x1F936: 0x1F385,
    0x1F46C: 0x1F46B, 0x1F46D: 0x1F46B,
}
_SAME_EMOJI = {                                           # sequences that only spell out the tones of one code point
    "1f9d1-1f91d-1f9d1": "1f46b", "1f9d1-2764-1f9d1": "1f491", "1f9d1-2764-1f48b-1f9d1": "1f48f",
    "1faf1-1faf2": "1f91d", "1f9d1-1f430-1f9d1": "1f46f", "1f9d1-1faef-1f9d1": "1f93c", "1f9d1-1f384": "1f385",
}
_OLD_NAMES = {                                            # names that no chars.json lists any more
    "crazy-face": "1f92a", "face-with-symbols-over-mouth": "1f92c", "man-in-business-suit-levitating": "1f574",
    "asterisk": "2a-20e3", "pound": "23-20e3", "pound-symbol": "23-20e3", **{f"{n}": f"3{n}-20e3" for n in range(10)},
    **{f"digit-{w}": f"3{n}-20e3" for n, w in enumerate("zero one two three four five six seven eight nine".split())},
}
_TONE_IN_NAME = re.compile(r"-(?:tone[1-5]|(?:medium-)?(?:light|dark)(?:-skin-tone)?|medium(?:-skin-tone)?)(?=-|$)")


@dataclass(frozen=True)
class _Package:
    """One npm package in memory."""

    name: str
    version: str
    licence: str
    files: dict[str, bytes]          # path below the package root -> content, JSON and WebP files only

    def json(self, path: str, needs: str = "") -> dict:
        """Parse one JSON member. Raises InputError when it, or its entry `needs`, is missing or it is not JSON."""
        try:
            content = json.loads(self.files[path])
            if needs and needs not in content:
                raise KeyError(needs)
        except (KeyError, ValueError) as error:
            raise InputError(f"package {self.name}: {path} is missing or damaged ({error}); fetch it again") from error
        return content


_Icon = tuple[str, str, str | bytes]     # name, code points ('' when the package does not say), SVG text or WebP file


def build_emoji(out: Path, source: Path | None = None, size: int = 128, progress: bool = True) -> Path:
    """Render all emoji at `size` x `size` pixels into the folder `out` and return it.

    `source` holds the four packages as .tgz files or unpacked folders; without it they are fetched with npm. A folder
    that is complete, of that size and made from the same packages is left as it is. Raises InputError for a size, a
    source or a package that cannot be used, MissingExtraError without resvg-py.
    """
    if size < 8:
        raise InputError(f"size {size}: pictures need at least 8 pixels; use --size 128")
    index = {"format": FORMAT, "size": size, "class_names": list(CLASS_NAMES)}
    if source is None and not _is_current(out, index):
        source = arimg_home() / "npm"
        fetch_packages(source)
    packages = {style: _find_package(source, name) for style, name in PACKAGES.items()} if source else {}
    if packages:
        index["packages"] = [{"name": p.name, "version": p.version, "licence": p.licence} for p in packages.values()]
    if _is_current(out, index):
        print(f"{out}: complete already, nothing to do (delete the folder to build it anew)", file=sys.stderr)
        return out
    if find_spec("resvg_py") is None:
        raise MissingExtraError("train", "resvg-py", "rendering the SVG emoji")
    pictures, items, index["counts"] = _plan(packages)
    if not pictures:
        raise InputError(f"--source {source}: no emoji with a known group in its packages; fetch them again")
    _write(out, pictures, items, index, progress)
    return out


def fetch_packages(folder: Path) -> None:
    """Put missing .tgz files of the four packages into `folder` with `npm pack`. Raises InputError when that fails."""
    missing = [name for name in PACKAGES.values() if not _tarballs(folder, name)]
    npm = shutil.which("npm")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        for name in missing:
            if npm is None:
                raise InputError(f"npm not found, needed to fetch {name}; install it or pass --source DIR")
            done = subprocess.run([npm, "pack", name, "--silent"], cwd=part, capture_output=True, text=True)
            found = _tarballs(Path(part), name)
            if done.returncode or not found:
                reason = (done.stderr.strip() or "no output").splitlines()[-1]
                raise InputError(f"npm pack {name} failed ({reason}); try again or pass --source DIR")
            os.replace(found[-1], folder / found[-1].name)


def emoji_key(codes: str) -> str:
    """The identity of an emoji in all styles, skin tones, genders: '1f468-1f3fd-200d-1f680' -> '1f9d1-1f680'."""
    points = [point for point in (int(code, 16) for code in codes.split("-")) if point != _VARIATION]
    kept = [point for before, point in zip([0, *points], points)
            if point not in _DROPPED and not (before == _ZWJ and point in _GENDER_OR_DIRECTION)]
    parts = [f"{_NEUTRAL.get(point, point):x}" for point in kept]
    if len(parts) > 1 and "1f9d2" in parts and set(parts) <= {"1f9d1", "1f9d2"}:     # children and adults: a family
        return "1f46a"
    key = "-".join(parts) or "1f3fb"
    return _SAME_EMOJI.get(key, key)


def is_held_out(key: str) -> bool:
    """Whether the emoji with this key is held out: one in ten, by the hash of the key alone."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def _tarballs(folder: Path, name: str) -> list[Path]:
    """The .tgz files of one package in a folder, oldest version first."""
    stem = name.lstrip("@").replace("/", "-")
    found = [path for path in folder.glob(f"{stem}-*.tgz") if re.match(r"\d", path.name[len(stem) + 1:])]
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name[len(stem):])])


def _find_package(source: Path, name: str) -> _Package:
    """Read a package from its newest .tgz file or unpacked folder in `source`. Raises InputError when there is none."""
    if not source.is_dir():
        raise InputError(f"--source {source}: no such folder; give the folder that holds the npm packages")
    tarballs = _tarballs(source, name)
    files = _read_tarball(tarballs[-1]) if tarballs else _read_folder(source, name)
    about = _Package(name, "", "", files).json("package.json")
    return _Package(name, str(about.get("version", "?")), str(about.get("license", "?")), files)


def _read_tarball(path: Path) -> dict[str, bytes]:
    """The JSON and WebP members of an npm tarball, in memory; the first folder of each name is dropped."""
    try:
        with tarfile.open(path) as tar:
            wanted = [member for member in tar if member.isfile() and member.name.endswith((".json", ".webp"))]
            content = {member.name.partition("/")[2]: tar.extractfile(member) for member in wanted}
            return {name: file.read() for name, file in content.items() if file is not None}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a readable .tgz file ({error}); delete it and fetch it again") from error


def _read_folder(source: Path, name: str) -> dict[str, bytes]:
    """The JSON and WebP files of the unpacked package in or below `source` that has this name."""
    for pattern in ("", "*/", "*/package/", "@*/*/", "node_modules/@*/*/"):
        for about in sorted(source.glob(f"{pattern}package.json")):
            if re.search(rf'"name"\s*:\s*"{re.escape(name)}"', about.read_text(encoding="utf-8")):
                root, suffixes = about.parent, (".json", ".webp")
                paths = sorted(path for path in root.rglob("*") if path.suffix in suffixes and path.is_file())
                return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    raise InputError(f"--source {source}: package {name} not found; run `npm pack {name}` in that folder")


def _plan(packages: dict[str, _Package]) -> tuple[list[str | bytes], list[dict], dict]:
    """The pictures that have a class, their index entries (same order), and what was left out, by reason."""
    group_of_key, codes_of_name = _groups_and_codes(packages)
    pictures, items, ungrouped, aliases = [], [], [], 0
    for style, package in packages.items():
        found, skipped = _webp_icons(package) if style == "fluent3d" else _svg_icons(package)
        aliases += skipped
        for name, codes, picture in found:
            codes = codes or _codes_by_name(name, codes_of_name)
            key = emoji_key(codes) if codes else ""
            group = group_of_key.get(key)
            if group is None:
                ungrouped.append(f"{style}/{name}")
                continue
            pictures.append(picture)
            items.append({"style": style, "group": group, "name": name, "key": key,
                          "class_id": CLASS_NAMES.index(f"{style}/{group}"),
                          "split": "held_out" if is_held_out(key) else "train"})
    return pictures, items, {"aliases": aliases, "ungrouped": ungrouped}


def _groups_and_codes(packages: dict[str, _Package]) -> tuple[dict[str, str], dict[str, str]]:
    """Key -> group and icon name -> code points, from the iconify packages; the first that knows wins."""
    slug_of = {title: slug for slug, title in GROUPS.items()}
    group_of_key: dict[str, str] = {}
    codes_of_name: dict[str, str] = {}
    for package in [package for style, package in packages.items() if style != "fluent3d"]:
        categories = package.json("metadata.json", "categories")["categories"]
        group_of_name = {name: slug_of[title] for title in slug_of for name in categories.get(title, ())}
        own = {name: codes for codes, name in package.json("chars.json").items()}
        for name, codes in own.items():
            if name in group_of_name:
                group_of_key.setdefault(emoji_key(codes), group_of_name[name])
        aliases = package.json("icons.json").get("aliases", {})
        own |= {name: own[alias["parent"]] for name, alias in aliases.items()
                if alias["parent"] in own and name not in own and not _transform(alias)}
        codes_of_name = own | codes_of_name
    return group_of_key, codes_of_name


def _codes_by_name(name: str, codes_of_name: dict[str, str]) -> str:
    """Code points of an icon that its package leaves unnamed, from its name without tones; '' when nobody knows it."""
    plain = name.removeprefix("flag-for-")
    toneless = _TONE_IN_NAME.sub("", plain)
    return codes_of_name.get(plain) or codes_of_name.get(toneless) or _OLD_NAMES.get(toneless, "")


def _svg_icons(package: _Package) -> tuple[list[_Icon], int]:
    """The icons of an iconify package, current ones before hidden ones, and how many plain aliases were skipped."""
    icons = package.json("icons.json", "icons")
    codes_of = {name: codes for codes, name in package.json("chars.json").items()}
    bodies = sorted(icons["icons"].items(), key=lambda entry: bool(entry[1].get("hidden")))
    aliases = icons.get("aliases", {})
    turned = {name: alias for name, alias in aliases.items() if _transform(alias) and alias["parent"] in icons["icons"]}
    svgs = {name: _svg(icons, icon) for name, icon in bodies}
    svgs |= {name: _svg(icons, icons["icons"][alias["parent"]], _transform(alias)) for name, alias in turned.items()}
    return [(name, codes_of.get(name, ""), svg) for name, svg in svgs.items()], len(aliases) - len(turned)


def _transform(alias: dict) -> str:
    """The SVG transform of an alias about the origin; '' for a plain second name."""
    if not any(alias.get(name) for name in ("rotate", "hFlip", "vFlip")):
        return ""
    x, y = (-1 if alias.get(name) else 1 for name in ("hFlip", "vFlip"))
    return f"rotate({90 * alias.get('rotate', 0)}) scale({x} {y})"


def _svg(icons: dict, icon: dict, transform: str = "") -> str:
    """A complete SVG document; sizes that an icon leaves out are those of its package, else iconify's 0, 0, 16, 16."""
    left, top, width, height = (icon.get(side, icons.get(side, default))
                                for side, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
    body = icon["body"]
    if transform:
        x, y = left + width / 2, top + height / 2
        body = f'<g transform="translate({x} {y}) {transform} translate({-x} {-y})">{body}</g>'
    return ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="SIZE" height="SIZE">{body}</svg>')


def _webp_icons(package: _Package) -> tuple[list[_Icon], int]:
    stems = {Path(path).stem: content for path, content in package.files.items() if path.endswith(".webp")}
    is_codes = re.compile(r"[0-9a-fA-F]+([-_][0-9a-fA-F]+)*").fullmatch
    return [(stem, stem.replace("_", "-") if is_codes(stem) else "", content)
            for stem, content in sorted(stems.items())], 0


def _render(picture: str | bytes, size: int) -> bytes:
    """size * size * 3 bytes of RGB on white; b'' for a picture that cannot be rendered or is blank."""
    import resvg_py
    from PIL import Image

    try:
        if isinstance(picture, str):
            svg = picture.replace('"SIZE"', f'"{size}"')
            picture = bytes(resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True))
        image = Image.open(io.BytesIO(picture)).convert("RGBA")
    except (ValueError, OSError):
        return b""
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = image.tobytes()
    return b"" if pixels == b"\xff" * len(pixels) else pixels


def _render_all(pictures: list[str | bytes], size: int, progress: bool) -> Iterator[bytes]:
    """One `_render` result per picture, in order."""
    from tqdm import tqdm

    render = partial(_render, size=size)
    bar = partial(tqdm, total=len(pictures), desc="emoji", unit="img", file=sys.stderr, disable=not progress)
    if len(pictures) < _POOL_FROM:
        yield from bar(map(render, pictures))
        return
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from bar(pool.map(render, pictures, chunksize=32))


def _write(out: Path, pictures: list[str | bytes], items: list[dict], index: dict, progress: bool) -> None:
    """Render into a temporary folder in `out`, then rename; the index comes last and says that all is there."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="part-") as part:
        images_part, index_part = Path(part, "images"), Path(part, "index")
        renders = _render_all(pictures, index["size"], progress)
        kept, left_out = _write_images(images_part, items, renders, index["size"])
        index = {**index, "counts": {**_count(kept), **left_out, **index["counts"]}, "items": kept}
        index_part.write_text(json.dumps(index, indent=0), encoding="utf-8")
        (out / "index.json").unlink(missing_ok=True)
        os.replace(images_part, out / "images.npy")
        os.replace(index_part, out / "index.json")
    counts = index["counts"]
    print(f"emoji: {counts['images']} images of {counts['emoji']} emoji; left out: {counts['duplicates']} duplicates, "
          f"{counts['aliases']} aliases, {len(counts['ungrouped'])} without a group, {len(counts['broken'])} broken "
          f"{' '.join(counts['broken'])}".rstrip(), file=sys.stderr)


def _write_images(path: Path, items: list[dict], renders: Iterator[bytes], size: int) -> tuple[list[dict], dict]:
    """Write the (N, size, size, 3) array; return the N items that it holds, and what was left out."""
    kept, broken, seen = [], [], set()
    layout = {"descr": "|u1", "fortran_order": False, "shape": (len(items), size, size, 3)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, layout)       # numpy pads it: its length is the same for any count
        start = file.tell()
        for item, pixels in zip(items, renders, strict=True):
            digest = hashlib.sha256(pixels).digest()
            if not pixels:
                broken.append(f"{item['style']}/{item['name']}")
            elif digest not in seen:
                seen.add(digest)
                file.write(pixels)
                kept.append(item)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**layout, "shape": (len(kept), size, size, 3)})
        assert file.tell() == start, (file.tell(), start)
    return kept, {"duplicates": len(items) - len(kept) - len(broken), "broken": broken}


def _count(items: list[dict]) -> dict:
    classes = Counter(CLASS_NAMES[item["class_id"]] for item in items)
    return {"images": len(items), "emoji": len({item["key"] for item in items}),
            "split": dict(Counter(item["split"] for item in items)),
            "styles": dict(Counter(item["style"] for item in items)),
            "classes": {name: classes[name] for name in CLASS_NAMES}}


def _is_current(out: Path, expected: dict) -> bool:
    """Whether `out` is complete and its index holds these entries."""
    found = open_emoji(out)
    return found is not None and all(found[0].get(name) == value for name, value in expected.items())
