"""What the coordinator keeps on disk: the database and the blobs."""
