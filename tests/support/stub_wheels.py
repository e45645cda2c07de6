"""Small wheels made by hand: a Fleetune that only tells its version, and PyTorches that were built for this or that."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]

PROGRAM = """\
import sys
def main():
    print({words!r})
    sys.exit({status})
"""


def wheel(folder: Path, name: str, version: str, files: Mapping[str, str], needs: Sequence[str] = (), scripts: Sequence[str] = ()) -> Path:
    """`name`-`version`-py3-none-any.whl with these files and no more; extras named in `needs` are declared."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    metadata += [f"Provides-Extra: {extra}" for extra in ("coordinator", "train", "parquet")]
    content = {
        **files,
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\n" + "".join(f"{script} = {name}.program:main\n" for script in scripts),
    }
    content[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
    file = folder / f"{name}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in content.items():
            archive.writestr(path, text)
    return file


def fleetune(folder: Path, version: str, *, status: int = 0, torch: str = "2.9.1") -> Path:
    """With the repository's own units and settings, and pins of one torch for every machine; its commands end with `status`."""
    share = f"fleetune-{version}.data/data/share/fleetune"
    files = {"fleetune/__init__.py": "", "fleetune/program.py": PROGRAM.format(words=f"fleetune {version}", status=status)}
    for sort in ("systemd", "config"):
        for file in sorted((REPO / "deploy" / sort).rglob("*.*")):
            files[f"{share}/{file.relative_to(REPO / 'deploy').as_posix()}"] = file.read_text(encoding="utf-8")
    files[f"{share}/constraints.txt"] = "\n".join(
        [
            "# pins",
            f"torch=={torch} ; sys_platform == 'linux' and platform_machine == 'aarch64'",
            f"torch=={torch} ; sys_platform != 'linux' or platform_machine != 'aarch64'",
            "",
        ]
    )
    return wheel(folder, "fleetune", version, files, scripts=("fleetune", "fleetune-agent"))


def torch(folder: Path, version: str = "2.9.1", *, cuda: str | None = None, needs: Sequence[str] = (), works: bool = True) -> Path:
    """`cuda` is what its version.py says it was built for."""
    body = "class zeros:\n    def __init__(self, size): pass\n    def add(self, number): return self\n"
    files = {
        "torch/__init__.py": body if works else "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n",
        "torch/version.py": f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n",
    }
    return wheel(folder, "torch", version, files, needs)
