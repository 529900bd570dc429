"""A small synthetic world: captioned pictures of two objects in a spatial relation, and a CLIP that knows it.

It stands in for real data and real weights in the demo, the tests and the quality benchmark: no download, ground truth
by construction, and a text encoder that was ruined the way diffusion training does it.
"""
