"""Training: data, objectives, one loop."""
