"""Checkpoints on disk and on the hub: what they hold, how they are read and how they are written."""
