"""Decoders: from a model and a condition to codes or latents."""
