import pytest

from tests.tiny_checkpoints import TinyCheckpoints


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory):
    return TinyCheckpoints(tmp_path_factory.mktemp("checkpoints"))
