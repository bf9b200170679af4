"""Every kept vector: sound, the same however it is fed, and described as the recipe that made it says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.stream_reading import comparable
from tests.support.vectors import unpack_vector
from tests.vectors.make import RECIPES, Recipe
from xenpv.cli.show import describe
from xenpv.source.saved import SavedDomain
from xenpv.stream.reader import Reader
from xenpv.verify.stream import verify

FORMS = {
    "tree": "three-level tree",
    "linear": "linear virtual list",
    "both": "linear virtual list and three-level tree",
}


@pytest.fixture(params=RECIPES, ids=lambda recipe: recipe.name)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    recipe = request.param
    assert isinstance(recipe, Recipe)
    return recipe


@pytest.fixture
def path(recipe: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "vector.save"
    path.write_bytes(unpack_vector(recipe))
    return path


def test_vector_breaks_no_rule(path: Path) -> None:
    report = verify(str(path))
    assert [str(finding) for finding in report.findings] == []
    assert report.deep


def test_vector_has_the_p2m_of_its_recipe(recipe: Recipe, path: Path) -> None:
    with SavedDomain.open(str(path)) as saved:
        shown = describe(saved)
    assert shown["xen"] == recipe.xen
    assert shown["config"]["name"] == recipe.name
    assert shown["p2m"]["form"] == FORMS[recipe.form]
    assert shown["memory_in_stream"] == recipe.memory << 20
    assert [vcpu["vcpu"] for vcpu in shown["vcpus"]] == list(range(recipe.vcpus))
    assert shown["start_info"]["cmd_line"] == f"p2m={recipe.form}"


def events(data: bytes, pieces: int, *, seed: int = 1) -> list[object]:
    """What a reader says of data fed in pieces of up to that many bytes; page content is skipped where it may be."""
    reader, position, out, chance = Reader(), 0, [], random.Random(seed)
    while not reader.done:
        event = reader.next_event()
        if event is not None:
            out.append(comparable(event))
        elif reader.skippable:
            n = min(reader.skippable, chance.choice([1, 4095, 1 << 20]))
            reader.skip(n)
            position += n
        elif not reader.done:
            piece = data[position : position + (pieces if pieces == 1 else chance.randint(1, pieces))]
            position += len(piece)
            reader.feed(piece) if piece else reader.feed_eof()
    return [*out, reader.offset]


def test_vector_fed_in_any_pieces_gives_the_same_events(recipe: Recipe) -> None:
    data = unpack_vector(recipe)
    expected = events(data, len(data))
    assert expected[-1] == len(data)
    assert events(data, 1) == expected
    assert events(data, 5000) == expected
    assert events(data + b"junk" * 1000, 5000, seed=2) == expected


def test_vector_truncated_names_the_offset(recipe: Recipe, tmp_path: Path) -> None:
    data, path = unpack_vector(recipe), tmp_path / "cut.save"
    for cut in sorted(random.Random(3).sample(range(40, len(data)), 12)):
        path.write_bytes(data[:cut])
        report = verify(str(path))
        assert not report.ok
        assert report.error is not None
        assert f"{cut:#x}" in str(report.error)
