"""Where data, caches, downloaded weights and training runs live."""

from __future__ import annotations

import os
from pathlib import Path


def arimg_home() -> Path:
    """$ARIMG_HOME, default ~/.cache/arimg."""
    return Path(os.environ.get("ARIMG_HOME") or Path.home() / ".cache" / "arimg").expanduser()
