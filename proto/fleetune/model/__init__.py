"""What the training children of both sides share: base, LoRA, trainables, rows, batches, evaluation."""
