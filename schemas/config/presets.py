"""What a recipe's source sets in other sections, applied where a config names no value of its own."""

from collections.abc import Mapping
from typing import Any

from schemas.config.objective import RECIPES, recipe_of


def presets_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The presets that apply to a config's mapping: those of its recipe whose keys it doesn't name itself."""
    kind = RECIPES.get(recipe_of(values.get("objective", {})))
    applied = {}
    for place, value in (kind.presets if kind else {}).items():
        section, _, key = place.partition(".")
        given = values.get(section, {})
        # What is no mapping is a whole section, or for its section to refuse.
        if isinstance(given, Mapping) and key not in given:
            applied[place] = value
    return applied


def with_presets(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's mapping with the presets of its recipe where it names no value of its own."""
    filled = dict(values)
    for place, value in presets_of(values).items():
        section, _, key = place.partition(".")
        filled[section] = {**filled.get(section, {}), key: value}
    return filled
