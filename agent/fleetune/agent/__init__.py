"""The agent daemon: measures its machine, trains in a child process, sends what came out."""
