"""Tiny models, made once for all tests of the folder."""

from __future__ import annotations

from support.tiny_fixtures import bert, causal_rows, gpt2, llama, offline, rows_file, t5

__all__ = ["bert", "causal_rows", "gpt2", "llama", "offline", "rows_file", "t5"]
