"""Images and a run that several test files compare with: each is made once."""
import pytest
from exact_runs import EVERYTHING, run


@pytest.fixture(scope='session')
def full_run(images, tmp_path_factory):
    """Four epochs with every source of chance on, all checkpoints kept; tests do not change it."""
    folder = tmp_path_factory.mktemp('full') / 'run'
    run(images, folder, *EVERYTHING)
    return folder
