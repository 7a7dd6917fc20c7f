"""Models that run: loaded, streamed from disk, watched, generating in accounted memory."""
