"""What every estimator is: settings that are only stored, checks of what it is given, saving and loading."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, final, get_type_hints

import numpy as np
import torch
from torch import nn

from mixtura.errors import CheckpointError, OutputError, SettingError, UserError, check_range, one_line
from mixtura.methods.estimators._learning import LEARNS, whole
from mixtura.methods.estimators._saved import FORMAT, from_json, read_saved
from mixtura.methods.estimators._training import seeded
from mixtura.methods.settings import as_plain, construct, fits
from mixtura.types import Routing

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] != "sklearn":
        raise
    raise UserError("estimators need scikit-learn; install mixtura[estimators]") from _error

# What settings of these names may be, unless an estimator says otherwise.
RANGES: Mapping[str, tuple[float, float]] = {
    "num_experts": (1, 4096),
    "d_hidden": (1, 1 << 16),
    "epochs": (1, 1 << 20),
    "batch_size": (2, 1 << 20),
    "learning_rate": (0, 1e3),
    "random_state": (0, 2**32 - 1),
}
_REACH = 1e150


class Estimator(BaseEstimator, ABC):
    """A model of scikit-learn's shape: `fit`, `predict`, and `route`, by which analyses read it.

    Constructors store settings and check nothing, as scikit-learn wants it; `check_settings` is called by
    `mixtura.create` and before anything is learned. What was learned is in attributes that end in ``_``.

    Attributes:
        ranges: the least and the greatest value of settings, where they are not those of `RANGES`.
    """

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        for name in LEARNS:
            if name in vars(cls):
                setattr(cls, name, whole(vars(cls)[name]))

    @abstractmethod
    def fit(self, X: Any, y: Any = None) -> Estimator:
        """Learn from rows, forgetting what was learned before; return the estimator."""

    @abstractmethod
    def predict(self, X: Any) -> np.ndarray:
        """What is expected of rows."""

    @abstractmethod
    def route(self, X: Any) -> Routing:
        """Which expert is given which row, with what weight."""

    @property
    @final
    def method_name(self) -> str:
        """The estimator's name in the catalogue."""
        return type(self).__module__.rpartition(".")[2]

    @final
    def check_settings(self) -> None:
        """Raise `SettingError` unless every setting is of its type and in its range.

        Numbers of numpy, which searches set, become Python's.
        """
        hints = get_type_hints(type(self).__init__)
        for name, value in self.get_params(deep=False).items():
            if not fits(value, hints[name]):
                raise SettingError(f"{name} of {type(self).__name__} must be {hints[name]}, got {value!r}")
            bounds = {**RANGES, **self.ranges}.get(name)
            if bounds is not None and isinstance(value, Real):
                check_range(type(self).__name__, name, as_plain(value), *bounds)
            setattr(self, name, as_plain(value))

    @final
    def rows(self, X: Any) -> np.ndarray:
        """Rows of as many finite numbers as were learned of, checked by scikit-learn.

        Raises:
            UserError: they are not finite, or of another width.
            NotFittedError: nothing was learned yet.
        """
        check_is_fitted(self)
        return self.in_reach(self._checked({"X": X, "reset": False, "dtype": np.float64}))

    @final
    def lessons(self, X: Any, y: Any, **how: Any) -> tuple[np.ndarray, np.ndarray]:
        """Rows and targets to learn of, checked by scikit-learn; ``how`` goes to its ``validate_data``.

        Raises:
            UserError: they are not finite, too few, not of one length, or there are no targets.
        """
        if y is None:
            raise UserError(
                f"{type(self).__name__} requires y to be passed, but the target y is None; give one a row"
            )
        rows, targets = self._checked({"X": X, "y": y, "dtype": np.float64, "ensure_min_samples": 2, **how})
        if how.get("y_numeric"):
            targets = self.in_reach(self.targets(targets), "y")
        return self.in_reach(rows), targets

    @final
    def fresh_rows(self, X: Any, least: int = 2) -> np.ndarray:
        """Rows to learn of, at least so many, where targets are checked otherwise or there are none.

        Raises:
            UserError: they are not finite, or too few.
        """
        return self.in_reach(self._checked({"X": X, "dtype": np.float64, "ensure_min_samples": least}))

    @final
    def classes_of(self, y: np.ndarray) -> np.ndarray:
        """The classes of labels, ascending.

        Raises:
            UserError: they are no classes, or one alone.
        """
        try:
            check_classification_targets(y)
        except (ValueError, TypeError) as error:
            raise UserError(_sentence(error, type(self).__name__)) from None
        classes = np.unique(y)
        self.check_classes(classes)
        return classes

    @final
    def most_probable(self, shares: np.ndarray) -> np.ndarray:
        """The class of each row's highest probability."""
        chosen: np.ndarray = self.classes_[shares.argmax(1)]
        return chosen

    @final
    def check_classes(self, classes: np.ndarray) -> None:
        """Raise `UserError` unless there are two classes or more to tell apart."""
        if len(classes) < 2:
            found = f", {classes.tolist()[0]!r}" if len(classes) else ""
            raise UserError(
                f"{type(self).__name__} tells classes apart and y has one class alone{found}; "
                "give rows of two or more"
            )

    @final
    @contextmanager
    def in_words(self) -> Iterator[None]:
        """Say what numpy or scikit-learn refuse as one sentence: `UserError`."""
        try:
            yield
        except (UserError, NotFittedError):
            raise
        except (ValueError, TypeError) as error:
            raise UserError(_sentence(error, type(self).__name__)) from None

    def targets(self, y: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Targets as an array of numbers; in a shape, where one is said, of as many rows.

        Raises:
            UserError: they are something else, rows of several lengths, or do not fit into the shape.
        """
        with self.in_words():
            values = np.asarray(y, dtype=np.float64)
        if shape is None:
            return values
        if values.shape[:1] != shape[:1] or values.size != np.prod(shape, dtype=int):
            raise UserError(
                f"targets of {type(self).__name__} are of shape {shape}, got "
                f"{'none' if y is None else values.shape}"
            )
        return values.reshape(shape)

    def labels(self, y: Any) -> np.ndarray:
        """Targets as an array of whatever they are.

        Raises:
            UserError: they are rows of several lengths.
        """
        with self.in_words():
            return np.asarray(y)

    def _checked(self, given: Mapping[str, Any]) -> Any:
        try:
            return validate_data(self, **given)
        except ValueError as error:
            raise UserError(_sentence(error, type(self).__name__)) from None
        except TypeError as error:
            if given.get("y_numeric"):
                self.targets(given["y"])
            if "parse data" in str(error):
                raise UserError(one_line(error)) from None
            raise

    @final
    def in_reach(self, values: np.ndarray, what: str = "X") -> np.ndarray:
        """Numbers that are known and whose squares are finite.

        Raises:
            UserError: there are others.
        """
        if np.isnan(values).any():
            raise UserError(_sentence(ValueError(f"Input {what} contains NaN"), type(self).__name__))
        if np.abs(values).max(initial=0.0) > _REACH:
            raise UserError(
                f"{what} of {type(self).__name__} has numbers beyond {_REACH:g}, whose squares overflow; "
                "scale them down"
            )
        return values

    def rebuild(self) -> None:
        """Make the modules anew whose weights `load` then reads; by default there are none."""

    @final
    def save(self, path: str | Path) -> None:
        """Write what was learned as a safetensors file, which `load` reads without running anything.

        Raises:
            UserError: nothing was learned, or it holds models that have no such form.
            OutputError: the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        check_is_fitted(self)
        tensors: dict[str, torch.Tensor] = {}
        facts: dict[str, Any] = {}
        for name, value in learned(self).items():
            _put_apart(self, name, value, tensors, facts)
        settings = as_plain(self.get_params())
        words = {"format": FORMAT, "name": self.method_name, "settings": settings, "facts": facts}
        kept = {name: one.contiguous().clone() for name, one in tensors.items()}
        try:
            save_file(kept, str(path), metadata={"mixtura": json.dumps(words)})
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {path}: {one_line(error)}") from None

    @classmethod
    @final
    def load(cls, path: str | Path) -> Any:
        """The estimator that `save` wrote.

        Raises:
            CheckpointError: the file holds something else, or an estimator of another class.
        """
        tensors, words = read_saved(Path(path))
        own = cls.__module__.rpartition(".")[2]
        if words["name"] != own:
            raise CheckpointError(f"{path} holds the estimator {words['name']}, not {own}")
        made = construct(cls, **words["settings"])
        for name, value in words["facts"].items():
            setattr(made, name, from_json(value))
        weights: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, slash, rest = key.partition("/")
            if slash:
                weights.setdefault(name, {})[rest] = tensor
            else:
                setattr(made, name, tensor.numpy())
        # Drawn only to be written over.
        with seeded(1):
            made.rebuild()
        for name, state in weights.items():
            getattr(made, name).load_state_dict(state)
        return made


def learned(estimator: Estimator) -> dict[str, Any]:
    """The attributes in which an estimator keeps what it learned, by name."""
    return {n: v for n, v in vars(estimator).items() if n.endswith("_") and not n.startswith("_")}


class Classifier(ClassifierMixin, Estimator, ABC):
    """An estimator of classes."""

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of rows whose class is right.

        Raises:
            UserError: labels are not one class a row, such as was learned.
        """
        with self.in_words():
            return float(super().score(X, y, sample_weight))


class Regressor(RegressorMixin, Estimator, ABC):
    """An estimator of numbers, one or several a row."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of the targets' variance that is explained.

        Raises:
            UserError: targets are no numbers, or others than was learned.
        """
        with self.in_words():
            return float(super().score(X, y, sample_weight))


def number_of(owner: str, name: str, value: Any, most: int = 1 << 20) -> int:
    """A whole number of things to make, from 1 on.

    Raises:
        SettingError: it is something else.
    """
    if not fits(value, int):
        raise SettingError(f"{name} of {owner} must be a whole number, got {value!r}")
    check_range(owner, name, as_plain(value), 1, most)
    return int(value)


def spread_of(values: np.ndarray) -> np.ndarray:
    """The standard deviation of every column over what is known, and 1 where it differs by rounding alone.

    >>> spread_of(np.array([[0.1, 3.0], [0.1, 5.0], [0.1, 4.0]])).round(4).tolist()
    [1.0, 0.8165]
    """
    largest = np.nanmax(np.abs(values), axis=0)
    # In units of the largest, as squares of tiny numbers would be 0; a power of two changes no bit.
    unit = np.exp2(np.frexp(largest)[1])
    spread = np.nanstd(values / unit, axis=0) * unit
    # A column of one number has a mean that is off by its rounding, and so a deviation of about 1e-16 of it.
    return np.where(spread > 1e-14 * largest, spread, 1.0)


def _sentence(error: ValueError | TypeError, name: str) -> str:
    text = one_line(error)
    if "inhomogeneous" in text or "setting an array element" in text:
        return f"rows of X or y of {name} have several lengths; give as many numbers in every row"
    if "could not convert" in text or "must be a string or a real number" in text:
        found = text.rpartition(": ")[2] if "convert" in text else text.rpartition("not ")[2]
        return (
            f"{name} takes numbers, got {found}; turn other values into numbers first "
            "(sklearn.preprocessing.OrdinalEncoder)"
        )
    if any(
        words in text for words in ("legacy multi-label", "Mix of label", "a mix of", "'<' not supported")
    ):
        return f"labels of {name} are one class a row, of one type, as it learned them; got others ({text})"
    if "NaN" in text or "infinity" in text:
        first = text.split(". ")[0].rstrip(".")
        return f"{first}; {name} takes finite numbers: fill gaps (sklearn.impute) or leave those rows out"
    return text


def _put_apart(
    owner: Estimator, name: str, value: Any, tensors: dict[str, torch.Tensor], facts: dict[str, Any]
) -> None:
    if isinstance(value, nn.Module):
        tensors |= {f"{name}/{key}": one for key, one in value.state_dict().items()}
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        tensors[name] = torch.from_numpy(value)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "UO":
        facts[name] = {"array": value.tolist(), "dtype": str(value.dtype)}
    elif isinstance(value, Real | str | list | tuple | None):
        facts[name] = as_plain(value)
    else:
        raise UserError(
            f"{type(owner).__name__} learned models of another library ({type(value).__name__} in {name}), "
            "which have no form that is safe to read; keep it in memory, or fit it again"
        )
