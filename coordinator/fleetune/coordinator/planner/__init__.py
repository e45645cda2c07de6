"""Who trains which block with how much of the uplink: pure decisions about a fleet's measured times, memory and links."""
