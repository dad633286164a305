"""The artifact store. `open_scores` reads a teacher cache in anybody's training loop."""

from opd_stream.store.reader import ScoredRow, ScoredRows, open_scores
from opd_stream.store.store import Store

__all__ = ["ScoredRow", "ScoredRows", "Store", "open_scores"]
