"""The device's side of each method; the coordinator's side has the same file names."""
