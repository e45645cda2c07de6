"""gRPC services, one per file, and the conversion of their messages."""
