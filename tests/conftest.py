"""Set-up of the tests: Paddle quick and on the CPU, the same random numbers for each test, and no hanging."""
import faulthandler
import os
import sys

import utils

import paddle
import pytest
from runs import make_images

paddle.set_device('cpu')                            # a GPU computes float32 in TF32, beyond the tests' limits
utils.tune_cpu()

TOO_LONG = 900                                      # seconds of a test that hangs; the slowest takes 200
stderr = sys.stderr.fileno()


def pytest_configure(config):
    """Find the standard error, which pytest has replaced already."""
    global stderr
    with config.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled():
        stderr = os.dup(sys.stderr.fileno())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """End the process with a traceback if a test hangs: a loader that waits does not react to signals."""
    faulthandler.dump_traceback_later(TOO_LONG, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def seed():
    paddle.seed(0)


@pytest.fixture(autouse=True)
def log_reaches_pytest():
    """A run in an earlier test has set the logger up for itself."""
    utils.log.propagate = True


@pytest.fixture
def write(tmp_path):
    """Return write(name, content), which makes a file in tmp_path and returns its path."""
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return str(path)
    return write


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """A folder of 20 training and 11 validation images; tests do not change it."""
    return make_images(tmp_path_factory.mktemp('images') / 'data')
