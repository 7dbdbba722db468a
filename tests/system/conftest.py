"""Runs that several test files compare with: each is made once."""
import os

import pytest
from exact_runs import CHANCE, STEPS, TWO, run, words
from runs import kill_all, processes, program, wait_until

from training import checkpoint


@pytest.fixture(scope='session')
def whole(images, tmp_path_factory):
    """A run with every source of chance on and a checkpoint after each step; tests do not change it."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    run(images, folder, *CHANCE, 'SAVE_STEPS', 1)
    assert [os.path.basename(path) for path in checkpoint.steps(folder)] == [
        f'step_{step:08d}.pdckpt' for step in range(STEPS, 0, -1)]
    return folder


@pytest.fixture(scope='session')
def two(images, tmp_path_factory):
    """A whole run on two processes, each with its own batch-norm statistics; tests do not change it."""
    folder = tmp_path_factory.mktemp('two') / 'run'
    program('main_multi_gpu.py', '-nprocs', 2, *words(images, folder, *TWO))
    return folder


@pytest.fixture
def log(tmp_path):
    """The file for the output of started programs; none of their processes may be left at the end."""
    path = tmp_path / 'output.txt'
    yield path
    try:
        wait_until(lambda: not processes(path), 5, 'no process left')
    finally:
        kill_all(path)
