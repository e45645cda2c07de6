"""Tiny models, made once for all tests of the folder."""

from __future__ import annotations

from support.tiny_fixtures import bert, llama, offline, t5

__all__ = ["bert", "llama", "offline", "t5"]
