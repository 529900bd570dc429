"""Trainers of a CLIP that `speed.py` times against each other. Each is a generator: every `next` is one whole step."""
