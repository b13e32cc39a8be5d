"""Key maps between published checkpoints and ours: dictionaries in, dictionaries out."""
