"""What test_distributed.py starts under torchrun: every recipe in turn, by each of two processes."""

import os
import sys
from pathlib import Path

from accelerate import PartialState

from arimg.train.launch import main
from tests.train.toy_runs import RECIPES, SHARDED, inputs

home = Path(os.environ["ARIMG_HOME"])
for recipe in RECIPES:
    main(home / f"{recipe}.yaml", [*inputs(home, recipe), f"name={recipe}-2x1", *sys.argv[1:]])
for recipe, settings in SHARDED.items():
    main(home / f"{recipe}.yaml", [f"name={recipe}-sharded", *sys.argv[1:], *settings, "train.sharding=fsdp2",
                                   "train.checkpoint_blocks=true", "train.save_steps=3"])
(home / f"world-{PartialState().process_index}").write_text(str(PartialState().num_processes))
