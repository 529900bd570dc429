"""The engine: reads, reassembles, repairs, measures and writes CLIP models.
Plain torch; it never imports ComfyUI, and importing this package imports nothing else."""

__version__ = "0.1.0"
