"""The algebra of LoRA pairs of unlike ranks, scales and structures: means, their truncation, and how far a result is from the mean."""
