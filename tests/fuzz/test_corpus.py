"""Inputs that a fuzzer found are read or refused with an error of mkaq; those that crashed once, too."""

from pathlib import Path

import pytest

from mkaq.errors import MkaqError
from tests.fuzz.corpus import crashed, kept
from tests.fuzz.readers import READERS


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("target", READERS)
def test_inputs_of_a_fuzzer(target: str, tmp_path: Path) -> None:
    inputs = [*kept(target), *crashed(target).values()]
    assert inputs, "no corpus"
    read, refused = READERS[target](tmp_path), 0
    for data in inputs:
        try:
            read(data)
        except MkaqError as error:
            refused += 1
            assert 2 <= error.exit_code <= 6
            assert error.what and "fault of mkaq" not in str(error)
    assert refused, "nothing of it is refused: the corpus is stale"
