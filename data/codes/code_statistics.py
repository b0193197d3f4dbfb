"""Statistics of the tokens of a store."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data.codes.token_store import TokenStore

ROWS_PER_READ = 65_536


@dataclass
class CodeStatistics:
    """
    Attributes:
        code_counts: (V,) how often each code occurs.
        class_counts: (C,) samples of each class.
    """

    code_counts: np.ndarray
    class_counts: np.ndarray

    @property
    def usage(self) -> float:
        """Share of the codebook that occurs."""
        return float((self.code_counts > 0).mean())

    @property
    def entropy(self) -> float:
        """Entropy of the code frequencies in bits; log2 V if all are equal."""
        shares = self.code_counts[self.code_counts > 0] / self.code_counts.sum()
        return float(-(shares * np.log2(shares)).sum()) + 0.0  # no negative zero

    def most_frequent(self, count: int) -> list[tuple[int, float]]:
        """Codes and their shares, the most frequent first."""
        codes = np.argsort(-self.code_counts, kind="stable")[:count]
        return [(int(code), float(self.code_counts[code] / self.code_counts.sum())) for code in codes]


def code_statistics(store: TokenStore) -> CodeStatistics:
    """Read a whole store once."""
    code_counts = np.zeros(store.meta.codebook_size, dtype=np.int64)
    for first in tqdm(range(0, len(store), ROWS_PER_READ), desc="counting codes", delay=2):
        code_counts += np.bincount(store.codes[first : first + ROWS_PER_READ].ravel(), minlength=len(code_counts))
    return CodeStatistics(code_counts, np.bincount(store.class_ids, minlength=store.meta.num_classes))
