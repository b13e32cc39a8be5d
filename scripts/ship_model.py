"""A run's exported pipeline as bfloat16: `python scripts/ship_model.py RUN/export arimg/assets/emoji`."""

from __future__ import annotations

import argparse

import torch

from arimg.checkpoints import load_component, read_index, save_pipeline


def main() -> None:
    """Write the folder; the numbers of its networks keep 8 significant bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export")
    parser.add_argument("output")
    arguments = parser.parse_args()
    index = read_index(arguments.export)
    components = {name: load_component(f"{arguments.export}/{name}") for name in index.components}
    print(save_pipeline(arguments.output, components, index.settings, torch.bfloat16))


if __name__ == "__main__":
    main()
