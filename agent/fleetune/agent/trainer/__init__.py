"""The training child: a process that computes what a task asks for and can be killed."""
