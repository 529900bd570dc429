"""Stands in for torchvision while open_clip is imported, where the real one is missing or does not fit torch.

open_clip builds its picture preprocessing and an option to freeze ResNets from torchvision. Its transformers use none
of it. The names are here to be imported; using one raises.
"""
