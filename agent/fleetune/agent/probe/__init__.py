"""What is read off the machine: one measured thing per module."""
