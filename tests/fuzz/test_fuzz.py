"""A short run of the fuzz targets, the same each time. Longer: python -m tests.fuzz.stream --seconds 600"""

from __future__ import annotations

import pytest

from tests.fuzz import cli, convert, core, image, p2m, restore, stream, verify
from tests.fuzz.mutate import case, corpus
from tests.fuzz.run import run


@pytest.mark.parametrize("seed", [1, 2])
def test_any_bytes_parse_or_raise_a_stream_error(seed: int) -> None:
    assert run(stream.target, seed=seed, cases=1000) == 1000


def test_any_bytes_are_a_kernel_or_raise_an_image_error() -> None:
    assert run(image.target, seed=1, cases=1000) == 1000


def test_any_bytes_are_a_core_or_raise_an_error_of_ours() -> None:
    assert run(core.target, seed=1, cases=60) == 60


def test_any_memory_gets_findings_or_a_guest_error() -> None:
    assert run(p2m.target, seed=1, cases=40) == 40


def test_any_file_gets_a_report() -> None:
    assert run(verify.target, seed=1, cases=200) == 200


def test_any_stream_becomes_a_domain_or_nothing() -> None:
    assert run(restore.Fuzzed().target, seed=1, cases=80) == 80


def test_any_file_is_converted_to_what_restores_or_refused() -> None:
    assert run(convert.target, seed=1, cases=60) == 60


def test_any_file_gets_an_answer_or_a_sentence() -> None:
    assert run(cli.target, seed=1, cases=200) == 200


def test_what_is_not_changed_holds_too() -> None:
    fuzzed = restore.Fuzzed()
    for n, sound in enumerate(corpus()):
        fuzzed.target(bytes(sound), n)
        stream.target(bytes(sound), n)
        verify.target(bytes(sound), n)
        cli.target(bytes(sound), n)


def test_a_case_is_the_same_each_time_and_most_differ() -> None:
    assert [case(7, n) for n in range(40)] == [case(7, n) for n in range(40)]
    assert len({case(7, n) for n in range(40)}) > 35


def test_a_failure_says_which_case_it_was() -> None:
    def fails_at_three(data: bytes, n: int) -> None:
        if n == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as e:
        run(fails_at_three, seed=9, cases=10)
    assert e.value.__notes__ == ["case 3 of seed 9"]
