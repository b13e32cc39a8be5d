"""What test_distributed.py starts under torchrun: every objective in turn, by each of two processes."""

import os
import sys
from pathlib import Path

from accelerate import PartialState

from arimg.train.launch import main
from tests.train.toy_runs import RECIPES

home = Path(os.environ["ARIMG_HOME"])
tokenizer = f"tokenizer={home / 'runs' / 'first' / 'export' / 'tokenizer'}"
for objective in RECIPES:
    given = [tokenizer] if objective in ("ar", "control") else []
    main(home / f"{objective}.yaml", [*given, f"name={objective}-2x1", *sys.argv[1:]])
for objective in ("ar", "control"):
    main(home / f"{objective}.yaml", [tokenizer, f"name={objective}-sharded", *sys.argv[1:], "model.codebook_dim=null",
                                      "train.sharding=fsdp2", "train.checkpoint_blocks=true", "train.save_steps=3"])
(home / f"world-{PartialState().process_index}").write_text(str(PartialState().num_processes))
