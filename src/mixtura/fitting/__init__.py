"""A memory budget and a model: the plan with the least measured loss, applied, verified, shown."""

from __future__ import annotations

from mixtura.fitting.estimate import Estimate
from mixtura.fitting.foreseeing import estimate_fit
from mixtura.fitting.records import Request
from mixtura.fitting.result import Fitted
from mixtura.fitting.run import fit
from mixtura.fitting.several import fit_several, several

__all__ = ["Estimate", "Fitted", "Request", "estimate_fit", "fit", "fit_several", "several"]
