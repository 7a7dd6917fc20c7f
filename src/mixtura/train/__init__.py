"""Training of models of mixtura's own: configuration, text, curriculum, and transformers' Trainer."""
