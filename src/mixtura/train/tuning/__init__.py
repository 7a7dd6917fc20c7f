"""Tuning a model of transformers with an adapter of the catalogue on a user's records."""

from __future__ import annotations

from mixtura.train.tuning.config import TuneConfig, tune_config
from mixtura.train.tuning.run import Tuned, run_tuning
from mixtura.train.tuning.start import tune

__all__ = ["TuneConfig", "Tuned", "run_tuning", "tune", "tune_config"]
