"""Checkpoints on disk and on the hub: finding, reading and writing them."""
