"""What the checks look at: plain facts, so that every board can be judged anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Board(Enum):
    """Families that differ in what has to be installed."""

    PI_4 = "Raspberry Pi 4"
    PI_5 = "Raspberry Pi 5"
    PI_OTHER = "another Raspberry Pi"
    JETSON = "NVIDIA Jetson"
    OTHER = "other"

    @property
    def is_raspberry(self) -> bool:
        return self in (Board.PI_4, Board.PI_5, Board.PI_OTHER)


@dataclass(frozen=True)
class Torch:
    """The installed PyTorch. `version` is empty where there is none; `trouble` says why it does not import."""

    version: str = ""
    cuda_build: str = ""
    cuda_usable: bool = False
    trouble: str = ""

    @property
    def release(self) -> tuple[int, int]:
        """(2, 10) of "2.10.0+cpu"; (0, 0) where there is none."""
        words = self.version.partition("+")[0].split(".")
        return (int(words[0]), int(words[1])) if len(words) >= 2 and words[0].isdigit() and words[1].isdigit() else (0, 0)


@dataclass(frozen=True)
class Facts:
    """One machine. None is "cannot be read"."""

    system: str = "Linux"
    machine: str = "x86_64"
    pointer_bytes: int = 8
    python: tuple[int, int] = (3, 12)
    board_name: str = ""
    l4t: str = ""
    """Release of a Jetson's Linux, for example "36.4.3"; empty elsewhere."""
    torch: Torch = Torch()
    missing_packages: tuple[str, ...] = ()
    nvidia_gpu: bool = False
    throttled: tuple[str, ...] | None = None
    memory_total_bytes: int = 8 << 30
    swap_total_bytes: int = 0
    clock_synchronised: bool | None = True
    clock_error_s: float | None = None
    state_dir: str = ""
    disk_free_bytes: int = 100 << 30
    temperature_c: float | None = None

    @property
    def board(self) -> Board:
        if self.l4t or any(word in self.board_name for word in ("Jetson", "NVIDIA", "Orin")):
            return Board.JETSON
        if "Raspberry Pi 4" in self.board_name or "Compute Module 4" in self.board_name or "Raspberry Pi 400" in self.board_name:
            return Board.PI_4
        if "Raspberry Pi 5" in self.board_name or "Compute Module 5" in self.board_name:
            return Board.PI_5
        return Board.PI_OTHER if "Raspberry Pi" in self.board_name else Board.OTHER

    @property
    def jetpack(self) -> int:
        """Major version of JetPack; 0 where it is not known."""
        return {"32": 4, "34": 5, "35": 5, "36": 6, "38": 7, "39": 7}.get(self.l4t.partition(".")[0], 0)
