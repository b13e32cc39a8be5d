"""How good it is: metrics, and the protocols they are measured by (docs/evaluation.md)."""
