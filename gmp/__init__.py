"""Repairs text encoders that diffusion training has broken. Plain torch; knows nothing of ComfyUI.

Importing this package, its command line or its settings does not import torch.
"""

__version__ = "0.1.0"

# Where a diffusion model reads the text encoder, in the order of computation; `gmp.clip.ReadPoints` says which model
# reads which. A repair that moves only `projected`, all that contrastive training sees, changes no SDXL picture.
READ_POINTS = ("penultimate", "last", "pooled", "projected")
