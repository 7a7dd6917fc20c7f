"""The arena: the same small model trained with every method of a kind, and what came out side by side."""
