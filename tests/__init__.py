"""A package with a file of its own: torch-fidelity installs another `tests` (into site-packages), which would win."""
