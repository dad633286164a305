"""The artifact store. `open_scores` reads a teacher cache in anybody's loop, without torch."""

from opd_stream.store.artifact import Artifact
from opd_stream.store.reader import ScoredRow, ScoredRows, open_scores
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rollouts_table
from opd_stream.store.store import Store

__all__ = [
    "Artifact",
    "Recipe",
    "ScoredRow",
    "ScoredRows",
    "Store",
    "open_scores",
    "rollouts_table",
]
