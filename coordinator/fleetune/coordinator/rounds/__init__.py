"""The life of a round: decide, commit, act, fold."""
