"""The model host's entry: requests in, results out."""

from __future__ import annotations

import os
import sys

from fleetune.child.entry import serve
from fleetune.coordinator.modelhost import host, shrinking


def main() -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return serve({"prepare": host.prepare, "evaluate": host.evaluate, "shrink": shrinking.shrink})


if __name__ == "__main__":
    sys.exit(main())
