import pytest

import sssd_compat

sssd_compat.apply()  # before Detectron2's data code is imported


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory):
    """A folder with the whole demo set, made once for all tests. Not to be changed."""
    from sssd.data.demo import make_demo_dataset

    root = tmp_path_factory.mktemp("demo")
    make_demo_dataset(str(root))
    return root
