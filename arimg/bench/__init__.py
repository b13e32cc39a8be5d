"""Measurements: where a training step's time goes, and what each decoder costs."""
