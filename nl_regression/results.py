"""What a sweep found about its networks: kept in one file as it goes, read by the scripts that compare.

Shapes: M networks, G grid points.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from nl_regression.target import deltas
from shared_utils.checkpoint import load_arrays, save_arrays
from shared_utils.runs import write_csv

FITS = 1e-4  # mean squared error on its points below which a network interpolates them
KNOWS = 0.1  # largest error below which it knows the function there


@dataclass(frozen=True)
class Networks:
    """M trained networks, sorted by n and trial: each an array (M,), `values` on the grid (M, G)."""

    n: np.ndarray
    trial: np.ndarray
    train_mse: np.ndarray
    diverged_at: np.ndarray
    values: np.ndarray

    @classmethod
    def load(cls, path: Path) -> "Networks":
        """Read what `save` wrote. Errors: `UserError` in one line when the file is missing, damaged or another's."""
        names = [field.name for field in fields(cls)]
        found = load_arrays(path, names)
        return cls(*(found[name] for name in names))

    def save(self, path: Path) -> None:
        """Write all arrays as one .npz."""
        save_arrays(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    def __len__(self) -> int:
        return len(self.n)

    def __getitem__(self, index: np.ndarray) -> "Networks":
        return Networks(*(getattr(self, field.name)[index] for field in fields(self)))

    def joined(self, other: "Networks") -> "Networks":
        """These and the others, sorted by n and trial."""
        both = Networks(*(np.concatenate([getattr(part, f.name) for part in (self, other)]) for f in fields(self)))
        return both[np.lexsort((both.trial, both.n))]

    def of_size(self, n: int) -> "Networks":
        """Those that saw n points."""
        return self[self.n == n]

    def sizes(self) -> list[int]:
        """The numbers of points, in increasing order."""
        return np.unique(self.n).tolist()

    def write_csv(self, path: Path) -> None:
        """A line for each network: n, trial, train_mse, delta_in, delta_out, diverged_at (0: it did not)."""
        delta_in, delta_out = deltas(self.values)
        columns = {"n": self.n, "trial": self.trial, "train_mse": self.train_mse}
        write_csv(
            path, rows_of(columns | {"delta_in": delta_in, "delta_out": delta_out, "diverged_at": self.diverged_at})
        )


def rows_of(columns: dict[str, np.ndarray]) -> list[dict]:
    """A row for each of the M entries of the columns, (M,) each, for `write_csv`: floats with six digits."""
    found = [[f"{v:.6g}" if isinstance(v, float) else v for v in column] for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*found, strict=True)]


def plain(row: dict) -> dict:
    """The row with None for what is not a number (a network diverged): JSON has no NaN."""

    def one(value):
        if isinstance(value, list):
            return [one(item) for item in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return {key: one(value) for key, value in row.items()}
