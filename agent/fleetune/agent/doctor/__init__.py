"""Whether this machine can be a device, and what to type where it cannot."""
