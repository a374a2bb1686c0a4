"""A server of the Open Inference Protocol over one model of each kind, and its unmodified client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tritonclient.http as triton

from support.open_inference import Gate, House, gated, opened_house


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The server, for a whole file of tests."""
    with opened_house(tmp_path_factory.mktemp("models")) as opened:
        yield opened


@pytest.fixture
def client(house: House) -> Iterator[triton.InferenceServerClient]:
    """A client of it."""
    with triton.InferenceServerClient(house.url.removeprefix("http://"), concurrency=8) as opened:
        yield opened


@pytest.fixture
def gate(house: House) -> Iterator[Gate]:
    """A model of it that answers when it is told to."""
    with gated(house) as opened:
        yield opened
