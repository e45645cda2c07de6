"""Every fuzz target by its name."""

from __future__ import annotations

from collections.abc import Mapping

from support import fuzz_methods, fuzz_targets
from support.fuzz_engine import Target

TARGETS: Mapping[str, type[Target]] = {kind.name: kind for kind in (*fuzz_targets.KINDS, *fuzz_methods.KINDS)}
