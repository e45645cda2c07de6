#!/usr/bin/env python3
"""Prints what pyproject.toml asks for, one requirement a line, so that packages go in before the code that changes daily.

python3 deploy/docker/requirements.py [EXTRA ...]      the core dependencies, and those of each extra
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent


def requirements(extras: list[str]) -> list[str]:
    # In the images' build it lies beside, in the repository further up.
    pyproject = next(folder / "pyproject.toml" for folder in (HERE, *HERE.parents) if (folder / "pyproject.toml").is_file())
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    lines: list[str] = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return lines


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
