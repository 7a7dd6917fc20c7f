"""Models that run: loaded, streamed from disk, watched, and generating within accounted memory."""
