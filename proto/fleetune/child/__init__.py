"""Child processes that speak JSON lines: the parent's side and the child's side."""
