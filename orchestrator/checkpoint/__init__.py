"""Checkpoints that are whole or not there, on any fsspec filesystem; rank 0 only."""
