import pytest

from sssd.data import make_demo_dataset


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory):
    """A folder with the whole demo set, made once for all tests. Not to be changed."""
    root = tmp_path_factory.mktemp("demo")
    make_demo_dataset(str(root))
    return root
