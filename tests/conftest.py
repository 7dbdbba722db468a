"""Set-up of the tests: Paddle quick, the same random numbers for each test."""
import paddle
import pytest

import utils

utils.tune_cpu()


@pytest.fixture(autouse=True)
def seed():
    paddle.seed(0)
