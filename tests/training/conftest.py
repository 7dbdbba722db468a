"""Images and a run that several test files compare with: each is made once."""
import pytest
from exact_runs import EVERYTHING, run
from runs import make_images


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """A folder of 20 training and 11 validation images; tests do not change it."""
    return make_images(tmp_path_factory.mktemp('images') / 'data')


@pytest.fixture(scope='session')
def full_run(images, tmp_path_factory):
    """Four epochs with every source of chance on, all checkpoints kept; tests do not change it."""
    folder = tmp_path_factory.mktemp('full') / 'run'
    run(images, folder, *EVERYTHING)
    return folder
