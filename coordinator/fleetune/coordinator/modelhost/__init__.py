"""The coordinator's only process that imports torch: first adapter, block map, evaluation."""
