"""Microbenchmarks: tokens per second per skip ratio, beside the limit and the peers."""
