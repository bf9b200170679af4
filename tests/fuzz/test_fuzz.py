"""A short run of the fuzz targets, the same each time. Longer: python -m tests.fuzz.stream --seconds 600"""

from __future__ import annotations

import pytest

from tests.fuzz import cli, convert, core, image, p2m, restore, stream, verify
from tests.fuzz.mutate import case, corpus
from tests.fuzz.run import run


@pytest.mark.parametrize("seed", [1, 2])
def test_fuzz_stream_parses_or_raises_stream_error(seed: int) -> None:
    assert run(stream.target, seed=seed, cases=1000) == 1000


def test_fuzz_image_parses_or_raises_image_error() -> None:
    assert run(image.target, seed=1, cases=1000) == 1000


def test_fuzz_core_parses_or_raises_xenpv_error() -> None:
    assert run(core.target, seed=1, cases=60) == 60


def test_fuzz_p2m_gives_findings_or_guest_error() -> None:
    assert run(p2m.target, seed=1, cases=40) == 40


def test_fuzz_verify_gives_a_report() -> None:
    assert run(verify.target, seed=1, cases=200) == 200


def test_fuzz_restore_gives_a_domain_or_leaves_none() -> None:
    assert run(restore.Fuzzed().target, seed=1, cases=80) == 80


def test_fuzz_convert_gives_a_restorable_file_or_none() -> None:
    assert run(convert.target, seed=1, cases=60) == 60


def test_fuzz_cli_exits_with_0_or_an_error_line() -> None:
    assert run(cli.target, seed=1, cases=200) == 200


def test_fuzz_unchanged_inputs_pass() -> None:
    fuzzed = restore.Fuzzed()
    for n, sound in enumerate(corpus()):
        fuzzed.target(bytes(sound), n)
        stream.target(bytes(sound), n)
        verify.target(bytes(sound), n)
        cli.target(bytes(sound), n)


def test_fuzz_cases_are_reproducible_and_distinct() -> None:
    assert [case(7, n) for n in range(40)] == [case(7, n) for n in range(40)]
    assert len({case(7, n) for n in range(40)}) > 35


def test_fuzz_failure_names_its_case() -> None:
    def fails_at_three(data: bytes, n: int) -> None:
        if n == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as e:
        run(fails_at_three, seed=9, cases=10)
    assert e.value.__notes__ == ["case 3 of seed 9"]
