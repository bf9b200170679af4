"""The kept save files of real guests, unpacked."""

from __future__ import annotations

import lzma

from tests.vectors.make import DEMO, FOR_DEMO, Recipe


def unpack_vector(recipe: Recipe) -> bytes:
    """Return the save file that a recipe made."""
    return lzma.decompress((DEMO if recipe is FOR_DEMO else recipe.path).read_bytes())
