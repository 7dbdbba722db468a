"""Runs and a browser that the tests of the pages have in common."""
import browser
import pytest
from runs import TINY, make_images
from tool_runs import make_untrained

from config import get_config
from training import engine


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images') / 'data', val=40)


@pytest.fixture(scope='session')
def trained(images, tmp_path_factory):
    """The folder of a finished run of three epochs."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    options = ['TRAIN.EMA_DECAY', 0.9, 'TRAIN.NUM_EPOCHS', 3, 'TRAIN.BASE_LR', 0.01]
    engine.run(get_config(None, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(folder), *options]))
    return folder


@pytest.fixture(scope='session')
def untrained(tmp_path_factory):
    return make_untrained(tmp_path_factory.mktemp('untrained'))


@pytest.fixture(scope='session')
def chromium():
    if not browser.find():
        pytest.skip(f'none of {", ".join(browser.NAMES)} is on PATH; the pages were checked as text only')
    with browser.Browser() as opened:
        yield opened
