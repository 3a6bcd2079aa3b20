"""Skipping on paper: bytes and time of models, precisions and machines, checked against what was measured."""
