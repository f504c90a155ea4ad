"""Recordings of activations: the hook that makes them, what is derived from them, harvests and dictionaries."""
