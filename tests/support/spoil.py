"""What a failing disk does to a file."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Literal

Kind = Literal["flip", "cut", "loss"]
KINDS: tuple[Kind, ...] = ("flip", "cut", "loss")


def spoil(path: Path, kind: Kind, rng: random.Random | None = None) -> None:
    """Flip one bit, cut the end off, or lose the file. In place: other names of the file see it, too."""
    rng = rng or random.Random(1)
    if kind == "loss":
        path.unlink()
        return
    mode, size = path.stat().st_mode, path.stat().st_size
    path.chmod(0o644)
    if kind == "cut":
        os.truncate(path, rng.randrange(size))
    else:
        with path.open("r+b") as file:
            at = rng.randrange(size)
            file.seek(at)
            byte = file.read(1)[0] ^ (1 << rng.randrange(8))
            file.seek(at)
            file.write(bytes([byte]))
    path.chmod(mode)
