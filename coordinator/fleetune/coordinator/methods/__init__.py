"""One file per method: what the coordinator does for it."""
