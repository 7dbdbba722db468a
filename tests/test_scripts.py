"""The scripts around training: the digits folder, the environment, the launchers. Nothing here installs or trains."""
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tools import make_digits

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ['run_demo.sh', 'run_tests.sh', 'run_train_multi.sh', 'run_eval_multi.sh', 'tools/setup_env.sh', '.ci/run']


def run(*command, **env):
    """stdout and stderr together, and the exit status. A variable that is None is removed."""
    env = {key: value for key, value in {**os.environ, 'PYTHON': None, **env}.items() if value is not None}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)
    return done.stdout, done.returncode


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/sh\n' + text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    make_digits.main([str(folder)])
    return folder


def entries(folder, part):
    return [line.split(' ') for line in (folder / f'{part}_list.txt').read_text().splitlines()]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_digits_lists_name_every_image_once(digits):
    train, val = entries(digits, 'train'), entries(digits, 'val')
    assert (len(train), len(val)) == (1437, 360)
    listed = [path for path, _ in train + val]
    assert len(set(listed)) == 1797
    assert set(listed) | {'train_list.txt', 'val_list.txt', 'class_names.txt'} == set(content(digits))


def test_digits_are_scikit_learns(digits):
    source = load_digits()
    for path, label in entries(digits, 'train') + entries(digits, 'val'):
        i = int(path[-8:-4])
        assert int(label) == source.target[i] and path.split('/')[1] == label
        with Image.open(digits / path) as image:
            assert image.mode == 'L' and image.size == (8, 8)
            np.testing.assert_array_equal(np.rint(np.asarray(image) * (16 / 255)), source.images[i])


def test_digits_split_is_stratified():
    labels = load_digits().target
    train, val = make_digits.split(labels)
    assert sorted([*train, *val]) == list(range(1797))
    for digit in range(10):
        assert abs((labels[val] == digit).sum() - (labels == digit).sum() / 5) < 1


def test_digits_are_the_same_every_time_and_repaired(digits, tmp_path):
    make_digits.main([str(tmp_path)])
    expected = content(digits)
    assert content(tmp_path) == expected
    (tmp_path / 'val_list.txt').unlink()
    (tmp_path / 'train/0/0000.png').write_bytes(b'half a file')
    untouched = (tmp_path / 'train/1/0001.png').stat().st_mtime_ns
    make_digits.main([str(tmp_path)])
    assert content(tmp_path) == expected
    assert (tmp_path / 'train/1/0001.png').stat().st_mtime_ns == untouched


def test_digits_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit):
        make_digits.main([str(tmp_path / 'file')])
    assert 'cannot write' in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path):
    """A folder with a space in its name that holds the setup script and the requirement files."""
    folder = tmp_path / 'my checkout'
    (folder / 'tools').mkdir(parents=True)
    shutil.copy(f'{ROOT}/tools/setup_env.sh', folder / 'tools')
    for name in ('requirements.txt', 'requirements-dev.txt'):
        shutil.copy(f'{ROOT}/{name}', folder)
    return folder


def set_up(checkout, *args, **env):
    return run('bash', str(checkout / 'tools/setup_env.sh'), *args, **env)


@pytest.mark.parametrize('version', ['2.7.18', '3.8.18', '3.14.0'])
def test_setup_refuses_an_unsupported_python(checkout, tmp_path, version):
    script(tmp_path / 'bin/python3', f'echo {version}')
    output, status = set_up(checkout, PATH=f'{tmp_path}/bin:{os.environ["PATH"]}')
    assert status == 1
    assert f'Python {version}' in output and '3.9 to 3.13' in output and 'PYTHON=' in output
    assert not (checkout / '.venv').exists()


def test_setup_names_a_python_that_is_not_there(checkout):
    output, status = set_up(checkout, PYTHON='python3.9999')
    assert status == 1 and 'python3.9999 not found' in output and 'PYTHON=' in output


@pytest.mark.parametrize('fails', ['-c import venv', '-m venv'])
def test_setup_names_the_package_when_venv_fails(checkout, tmp_path, fails):
    python = script(tmp_path / 'python3', f'case "$*" in "{fails}"*) exit 1;; -c*) echo 3.11.2;; esac')
    output, status = set_up(checkout, PYTHON=python)
    assert status == 1 and 'apt install python3-venv' in output
    assert not (checkout / '.venv').exists()


def fake_venv(checkout, tmp_path, pip):
    """A Python whose -m venv makes a .venv with a `python` that answers as 3.11.2 and, to -m pip install, runs `pip`."""
    inner = script(tmp_path / 'inner', f'''
        case "$*" in
        -c*) echo 3.11.2;;
        *"pip install"*) echo called >> '{tmp_path}/pip.log'; {pip};;
        *"pip show"*) [ -e '{tmp_path}/gpu' ];;
        esac''')
    return script(tmp_path / 'outer', f'''
        case "$*" in
        -c*) echo 3.11.2;;
        "-m venv"*) mkdir -p "$4/bin"; cp '{inner}' "$4/bin/python";;
        esac''')


def pip_calls(tmp_path):
    return len((tmp_path / 'pip.log').read_text().split())


def test_setup_calls_pip_once_per_state(checkout, tmp_path):
    python = fake_venv(checkout, tmp_path, pip='true')
    for calls, args in ((1, []), (1, []), (2, ['requirements-dev.txt']), (2, ['requirements-dev.txt']), (2, [])):
        output, status = set_up(checkout, *args, PYTHON=python)
        assert (status, pip_calls(tmp_path)) == (0, calls), output
    assert set_up(checkout) == ('', 0)                           # without PYTHON: what is there
    with open(checkout / 'requirements.txt', 'a') as file:
        file.write('# changed\n')
    assert set_up(checkout)[1] == 0 and pip_calls(tmp_path) == 3


def test_setup_tries_again_after_a_failed_install(checkout, tmp_path):
    python = fake_venv(checkout, tmp_path, pip=f"[ -e '{tmp_path}/network' ]")
    for _ in range(2):
        output, status = set_up(checkout, PYTHON=python)
        assert status == 1 and 'pip could not install requirements.txt' in output and 'proxy' in output
    (tmp_path / 'network').touch()
    assert set_up(checkout, PYTHON=python)[1] == 0 and pip_calls(tmp_path) == 3


def test_setup_keeps_paddle_for_gpu(checkout, tmp_path):
    python = fake_venv(checkout, tmp_path, pip=f"cat \"$5\" > '{tmp_path}/installed'")
    for gpu in (False, True):
        if gpu:
            (tmp_path / 'gpu').touch()
            (checkout / '.venv/.installed-requirements.txt').unlink()
        output, status = set_up(checkout, PYTHON=python)
        assert status == 0, output
        installed = (tmp_path / 'installed').read_text()
        assert bool(re.search('^paddlepaddle==', installed, re.M)) != gpu and re.search('^pyyaml', installed, re.M)


def test_setup_names_a_missing_requirement_file(checkout):
    output, status = set_up(checkout, 'requirements-none.txt')
    assert status == 1 and 'requirements-none.txt: no such file' in output


@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_are_executable_and_parse(name):
    path = os.path.join(ROOT, name)
    assert os.access(path, os.X_OK)
    assert run('bash', '-n', path) == ('', 0)


def launch(tmp_path, name, *args, **env):
    """The arguments with which the launcher calls Python."""
    python = script(tmp_path / 'a python', 'for i; do echo "$i"; done')
    unset = dict.fromkeys(['CFG', 'DATA', 'BATCH_SIZE', 'PRETRAINED', 'OUTPUT'])
    output, status = run(f'{ROOT}/{name}', *args, **{**unset, 'PYTHON': python, **env})
    return output.splitlines(), status


def test_train_launcher(tmp_path):
    arguments, status = launch(tmp_path, 'run_train_multi.sh')
    common = [f'{ROOT}/main_multi_gpu.py', '-cfg', f'{ROOT}/configs/halonet_26t_256.yaml', '-dataset', 'imagenet2012']
    assert (arguments, status) == ([*common, '-data_path', '/dataset/imagenet'], 0)
    arguments, _ = launch(tmp_path, 'run_train_multi.sh', '-amp', '-resume', 'auto', DATA='my data', BATCH_SIZE='8', OUTPUT='out')
    assert arguments == [*common, '-data_path', 'my data', '-batch_size', '8', '-output', 'out', '-amp', '-resume', 'auto']


def test_eval_launcher(tmp_path):
    output, status = launch(tmp_path, 'run_eval_multi.sh')
    assert status == 2 and 'PRETRAINED=' in output[0]
    arguments, _ = launch(tmp_path, 'run_eval_multi.sh', '-amp', PRETRAINED='w.pdparams', BATCH_SIZE='8')
    assert arguments[5:] == ['-data_path', '/dataset/imagenet', '-eval', '-pretrained', 'w.pdparams', '-batch_size_eval', '8',
                             '-amp']


@pytest.mark.parametrize('script', ['run_train_multi.sh', 'run_eval_multi.sh'])
def test_launchers_run_under_sh_as_the_predecessors_did(script, tmp_path):
    done = subprocess.run(['sh', os.path.join(ROOT, script), '-h'], capture_output=True, text=True,
                          env={**os.environ, 'PYTHON': sys.executable, 'PRETRAINED': 'w'})
    assert done.returncode == 0 and '-data_path' in done.stdout, done.stderr


def test_launchers_speak_the_config_command_line(tmp_path):
    import config
    arguments, _ = launch(tmp_path, 'run_eval_multi.sh', '-amp', PRETRAINED='w.pdparams', BATCH_SIZE='8', OUTPUT='out')
    parsed = config.parse_args(arguments[1:])
    assert parsed.EVAL and parsed.AMP and parsed.DATA.BATCH_SIZE_EVAL == 8 and parsed.OUTPUT == 'out'
