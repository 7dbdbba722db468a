"""Training from archives has the bytes of a training from loose files, also after a kill."""
import signal
import time

import pytest
from archived import FORMS, as_tar, as_zip
from exact_runs import EVERYTHING, assert_same_run, run, words
from runs import program, start


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
    process = start('main_single_gpu.py', *command, log=tmp_path / 'log.txt')
    deadline = time.monotonic() + 60
    while not list(folder.glob('checkpoints/step_*4.pdckpt')) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / 'final.pdparams').exists()
    program('main_single_gpu.py', *command)
    for name in ('final.pdparams', 'final_ema.pdparams'):
        assert (folder / name).read_bytes() == (full_run / name).read_bytes()


def test_archive_with_the_lists_continues_a_run_on_loose_files(images, full_run, tmp_path):
    checkpoint = sorted((full_run / 'checkpoints').iterdir())[0]
    data = as_zip(images, tmp_path)
    run(str(data), tmp_path / 'run', *EVERYTHING, 'MODEL.RESUME', str(checkpoint))
    assert (tmp_path / 'run' / 'final.pdparams').read_bytes() == (full_run / 'final.pdparams').read_bytes()
