"""One thread per test process: toy tensors are faster so, and results do not depend on the machine's core count.

No test goes to a model hub: an unknown hub id fails at once, with or without a network.
"""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")        # huggingface_hub reads it when it is imported, by a test
torch.set_num_threads(1)
