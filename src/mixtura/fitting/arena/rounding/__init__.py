"""The arena of quantizers: every one in the same bytes, on the same calibration and held-out text."""
