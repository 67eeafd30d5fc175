from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.little_server import Live, live, tiny_catalog


@pytest.fixture(scope="session")
def server(tiny_tokenizer: Any) -> Iterator[Live]:
    """A server of one tiny model with the default bounds, for tests that leave nothing behind."""
    with live(tiny_catalog(tiny_tokenizer)) as found:
        yield found
