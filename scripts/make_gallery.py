"""Paint the picture at the top of the README: `python scripts/make_gallery.py docs/gallery.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from arimg import Pipeline, images

ROWS = (            # file below examples/, control type, group of the class
    ("canny.png", "canny", "animals"),
    ("canny-lion.png", "canny", "animals"),
    ("canny-doughnut.png", "canny", "food"),
    ("softedge-lion.png", "softedge", "animals"),
    ("lineart-sunflower.png", "lineart", "animals"),
    ("drawn-fish.png", "lineart", "animals"),
    ("foreign/drawn/apple.png", "lineart", "food"),
    ("foreign/clipart/turtle.png", "canny", "animals"),
    ("foreign/photos/coffee.png", "canny", "food"),
    ("foreign/photos/astronaut.png", "canny", "people"),
    ("color-lion.png", "color", "animals"),
    ("color-strawberry.png", "color", "food"),
)
STYLES = ("noto", "twemoji", "fluent", "fluent3d")


def main() -> None:
    """One row per example map: the map, then one picture per style, two seeds each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="emoji")
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained(arguments.model)
    tiles = []
    for name, kind, group in ROWS:
        control = images.load_image(Path("examples") / name)
        classes = [f"{style}/{group}" for style in STYLES]
        tiles += [control, *pipe(control=control, control_type=kind, class_name=classes, n=2).images]
    images.save_image(images.make_grid(tiles, columns=1 + 2 * len(STYLES)), arguments.output)


if __name__ == "__main__":
    main()
