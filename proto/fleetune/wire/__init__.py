"""What both sides agree on about bytes: tensor files, chunks, base models, channels."""
