"""From captioned pictures to batches: captions (index), images (preprocessing), sampler (order)."""
