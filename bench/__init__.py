"""The benchmark suite: the same work on every device and in every peer, checked, timed in turn, and reported."""
