"""Networks that read tokens: transformers, their layers, and text conditioning."""
