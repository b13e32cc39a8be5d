"""`python -m arimg.train configs/train/X.yaml [key=value ...]`, for torchrun and accelerate launch."""

import sys

from arimg.cli import main

main(["train", *sys.argv[1:]])
