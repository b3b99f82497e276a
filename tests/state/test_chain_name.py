from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.chain_name import ChainName


@given(st.from_regex(r"\A[A-Za-z0-9._-]+\Z"), st.integers(0, 10**18 - 1), st.integers(0, 10**9 - 1))
def test_there_and_back(model: str, epoch: int, ordinal: int) -> None:
    name = ChainName(model, epoch, ordinal)
    assert ChainName.of(str(name)) == name


@pytest.mark.parametrize(
    "text", ["", "deepfm", "deepfm/1", "/1/2", "deepfm/01/2", "deepfm/-1/2", "deepfm/1/2/3", "deepfm/1/2\n", "a b/1/2", "a/١/2"]
)
def test_a_text_that_names_no_chain(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected the name of a chain such as deepfm/12/0, found "):
        ChainName.of(text)
