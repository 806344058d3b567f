"""The mutation gate can still be applied; it runs in `make soak`."""

import pytest

from tests.faults.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_product_holds_what_is_to_be_taken_out(mutation: Mutation) -> None:
    for file, old, _ in mutation.edits:
        assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1
    for test in mutation.tests:
        assert (ROOT / test.partition("::")[0]).exists()
