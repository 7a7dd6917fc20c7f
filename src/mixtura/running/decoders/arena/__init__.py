"""The arena of decoders: a model answers the same questions by every one, and what that takes is counted."""
