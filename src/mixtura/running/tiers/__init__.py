"""A model in less memory than its weights: experts in a fixed pool, the rest on disk, the same answers."""
