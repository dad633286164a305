"""What other runs measured in the same store, where this one has nothing of its own yet.

A store in an object store is not searched: each recipe would cost a request.
"""

from collections.abc import Iterable

from opd_stream.store.artifact import Artifact
from opd_stream.store.files import is_remote
from opd_stream.store.recipe import Recipe
from opd_stream.store.store import Store
from pipeline.forecast.units import commits_of

_SAMPLING = ("temperature", "stop_ids", "extra_draws")  # what decides how completions end
_PARTIAL = ("probe", "extends")  # settings of rollouts that only go on where others end


def similar_rollouts(store: Store, recipe: Recipe) -> Artifact | None:
    """Rollouts of the same student on the same prompts, under the longest window there is."""
    return _first_committed(
        store,
        sorted(
            (
                other
                for other in _recipes(store, recipe)
                if other.inputs == recipe.inputs
                and not any(name in other.settings for name in _PARTIAL)
                and all(other.settings.get(n) == recipe.settings.get(n) for n in _SAMPLING)
            ),
            key=lambda other: -other.settings["window_tokens"],
        ),
    )


def similar_scores(store: Store, recipe: Recipe) -> Artifact | None:
    """Scores by the same teacher in the same columns, whatever they score."""
    return _first_committed(
        store,
        (
            other
            for other in _recipes(store, recipe)
            if other.settings == recipe.settings
            and other.inputs.get("teacher") == recipe.inputs["teacher"]
            and "scores" not in other.inputs  # an extension counts only its new tokens
        ),
    )


def _recipes(store: Store, recipe: Recipe) -> Iterable[Recipe]:
    return [] if is_remote(store.root) else store.recipes(recipe.kind)


def _first_committed(store: Store, recipes: Iterable[Recipe]) -> Artifact | None:
    artifacts = (store.artifact(recipe) for recipe in recipes)
    return next((artifact for artifact in artifacts if commits_of(artifact)), None)
