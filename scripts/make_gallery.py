"""Paint the picture at the top of the README: `python scripts/make_gallery.py docs/demo.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from arimg import Pipeline, images

ROWS = {
    "canny.png": "animals", "canny-lion.png": "animals", "canny-doughnut.png": "food", "softedge-lion.png": "animals",
    "lineart-sunflower.png": "animals", "drawn-fish.png": "animals", "color-lion.png": "animals",
    "color-strawberry.png": "food",
}
STYLES = ("noto", "twemoji", "fluent", "fluent3d")


def main() -> None:
    """One row per example map: the map, then one picture per style, two seeds each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="emoji")
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained(arguments.model)
    tiles = []
    for name, group in ROWS.items():
        control = images.load_image(Path("examples") / name)
        kind = name.removesuffix(".png").split("-")[0].replace("drawn", "lineart")
        classes = [f"{style}/{group}" for style in STYLES]
        tiles += [control, *pipe(control=control, control_type=kind, class_name=classes, n=2).images]
    images.save_image(images.make_grid(tiles, columns=1 + 2 * len(STYLES)), arguments.output)


if __name__ == "__main__":
    main()
