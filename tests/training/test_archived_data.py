"""Training from archives has the bytes of a training from loose files, also after a kill."""
import os
import signal
import subprocess
import sys

import pytest
from archived import FORMS, as_tar, as_zip
from exact_runs import EVERYTHING, assert_same_run, run, words
from runs import ROOT, program

KILLED = """
import os, runpy, signal, sys
from training import checkpoint
save = checkpoint.save
def save_and_die(folder, step, *rest):
    save(folder, step, *rest)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = save_and_die
sys.argv[0] = 'main_single_gpu.py'
runpy.run_path('main_single_gpu.py', run_name='__main__')
"""


@pytest.mark.parametrize('form', FORMS)
def test_training_has_the_same_bytes_as_from_loose_files(images, full_run, tmp_path, form):
    (tmp_path / 'data').mkdir()
    data = FORMS[form](images, tmp_path / 'data')
    run(str(data), tmp_path / 'run', *EVERYTHING)
    assert_same_run(tmp_path / 'run', full_run)


@pytest.mark.parametrize('form', ['zip', 'parquet'])
def test_data_processes_read_members(images, full_run, tmp_path, form):
    run(str(FORMS[form](images, tmp_path)), tmp_path / 'run', *EVERYTHING, 'DATA.NUM_WORKERS', 2)
    assert_same_run(tmp_path / 'run', full_run)


def test_killed_run_on_a_tar_resumes_to_the_same_bytes(images, full_run, tmp_path):
    data, folder = as_tar(images, tmp_path), tmp_path / 'run'
    command = words(str(data), folder, *EVERYTHING, 'SAVE_STEPS', 1, 'MODEL.RESUME', 'auto')
    code = subprocess.run([sys.executable, '-c', KILLED, *map(str, command)], cwd=ROOT, check=False,
                          env={**os.environ, 'PYTHONPATH': ROOT}).returncode
    assert code == -signal.SIGKILL and not (folder / 'final.pdparams').exists()
    program('main_single_gpu.py', *command)
    for name in ('final.pdparams', 'final_ema.pdparams'):
        assert (folder / name).read_bytes() == (full_run / name).read_bytes()


def test_archive_with_the_lists_continues_a_run_on_loose_files(images, full_run, tmp_path):
    checkpoint = sorted((full_run / 'checkpoints').iterdir())[0]
    data = as_zip(images, tmp_path)
    run(str(data), tmp_path / 'run', *EVERYTHING, 'MODEL.RESUME', str(checkpoint))
    assert (tmp_path / 'run' / 'final.pdparams').read_bytes() == (full_run / 'final.pdparams').read_bytes()
