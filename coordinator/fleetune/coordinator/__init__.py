"""The coordinator: decides, stores, folds."""
