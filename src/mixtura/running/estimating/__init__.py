"""Estimators compared: problems by family, plain baselines, and the arena's page."""
