"""The scripts around training: the digits, the environment, the launchers. Nothing installs or trains."""
import os
import re
import shlex
import shutil
import subprocess
import sys

from system import files
from tools import make_digits

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCRIPTS = [
    'run_demo.sh', 'run_tests.sh', 'run_train_multi.sh', 'run_eval_multi.sh', 'tools/setup_env.sh', '.ci/run']


def run(*command, **env):
    """stdout and stderr together, and the exit status. A variable that is None is removed."""
    env = {key: value for key, value in {**os.environ, 'PYTHON': None, **env}.items() if value is not None}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=60, check=False)
    return done.stdout, done.returncode


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/sh\n' + text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope='module')
def no_sync():
    """Files are not flushed to the disk, which takes most of the time for 1,797 of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, 'sync', lambda descriptor: None)
        yield


@pytest.fixture(scope='module')
def digits(tmp_path_factory, no_sync):
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
    """A Python 3.11.2 whose -m venv makes a .venv, and whose -m pip install there runs `pip`."""
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
    dev = ['requirements-dev.txt']
    for calls, args in ((1, []), (1, []), (2, dev), (2, dev), (2, [])):
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
        assert bool(re.search('^paddlepaddle==', installed, re.M)) != gpu
        assert re.search('^pyyaml', installed, re.M)


def test_setup_names_a_missing_requirement_file(checkout):
    output, status = set_up(checkout, 'requirements-none.txt')
    assert status == 1 and 'requirements-none.txt: no such file' in output


@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_are_executable_and_parse(name):
    path = os.path.join(ROOT, name)
    assert os.access(path, os.X_OK)
    assert run('bash', '-n', path) == ('', 0)


# ---- help, sh, and options that are mistakes

@pytest.fixture
def clone(tmp_path):
    """A clone in a folder with a space in its name, without an environment, and with the demo's last run."""
    folder = tmp_path / 'my clone'
    wanted = shutil.ignore_patterns('.*', 'demo', 'output', 'runs', 'tests', 'docs', '__pycache__')
    shutil.copytree(ROOT, folder, ignore=wanted)
    (folder / 'demo' / 'run').mkdir(parents=True)
    (folder / 'demo' / 'run' / 'final.pdparams').write_bytes(b'the last run')
    return folder


VARIABLES = {
    'run_demo.sh': ['PYTHON='], 'run_tests.sh': ['PYTHON='], 'tools/setup_env.sh': ['PYTHON='],
    'run_train_multi.sh': [
        'CFG=', 'DATA=', 'BATCH_SIZE=', 'PRETRAINED=', 'OUTPUT=', 'NPROCS=', 'NNODES=', 'MAX_RESTARTS='],
    'run_eval_multi.sh': ['CFG=', 'DATA=', 'BATCH_SIZE=', 'PRETRAINED', 'OUTPUT=', 'NPROCS=', 'NNODES=']}


@pytest.mark.parametrize('name', VARIABLES)
@pytest.mark.parametrize('words', [['sh', '-h'], ['bash', '--help']])
def test_help_shows_the_variables_and_changes_nothing(clone, tmp_path, name, words):
    before = content(clone)
    python = sys.executable if 'multi' in name else None
    output, status = run(words[0], str(clone / name), words[1], PYTHON=python)
    assert status == 0 and all(variable in output for variable in VARIABLES[name]), output
    assert content(clone) == before and not (clone / '.venv').exists()
    if 'multi' in name:
        assert '-batch_size_eval' in output         # the options of the program, too


def make_environment(clone):
    script(clone / '.venv/bin/python', f'exec "{sys.executable}" "$@"')
    script(clone / 'tools/setup_env.sh', 'exit 0')


@pytest.mark.parametrize('words, message', [
    (['-opts', 'SED', '1'], 'unknown option SED; did you mean SEED?'),
    (['-sed', '1'], 'unrecognized arguments: -sed 1'),
    (['-output', 'x'], 'it sets -output'), (['-eval'], 'it sets -output'),
    (['-opts', 'TRAIN.SMOOTHING', '1.0'], 'below 1')])
def test_a_mistake_in_the_demo_s_options_keeps_the_last_run(clone, words, message):
    make_environment(clone)
    output, status = run(str(clone / 'run_demo.sh'), *words)
    assert status == 2 and message in output and output.count('\n') == 1, output
    assert (clone / 'demo/run/final.pdparams').read_bytes() == b'the last run'


def test_the_demo_runs_by_sh_and_prints_paths_for_a_shell(clone):
    """With a Python that does nothing but claim a result."""
    script(clone / '.venv/bin/python', 'mkdir -p demo/eval; echo "acc@1 1.00" > demo/eval/log.txt')
    script(clone / 'tools/setup_env.sh', 'exit 0')
    output, status = run('sh', str(clone / 'run_demo.sh'), '-opts', 'SEED', '1')
    assert status == 0 and 'demo: done: acc@1 1.00' in output and 'source .venv/bin/activate' in output
    shown = re.search(r'^  weights   (.*)$', output, re.M)[1]
    assert shlex.split(shown) == [str(clone / 'demo/run/final.pdparams')]
    assert shlex.split(re.search(r'^  cd (.*?) && ', output, re.M)[1]) == [str(clone)]


@pytest.mark.parametrize('name', ['run_train_multi.sh', 'run_eval_multi.sh'])
def test_restarts_need_a_resume_that_they_can_override(name, tmp_path):
    variables = {'PRETRAINED': 'w', 'MAX_RESTARTS': '1', 'OUTPUT': 'o'}
    output, status = launch(tmp_path, name, '-opts', 'MODEL.RESUME', 'x', **variables)
    assert status == 2 and 'MAX_RESTARTS needs -resume' in output[0]


# ---- missing packages

PROGRAMS = ['main_single_gpu.py', 'main_multi_gpu.py', *sorted(
    f'tools/{name}' for name in os.listdir(f'{ROOT}/tools') if name.endswith('.py')
    and "__name__ == '__main__'" in open(f'{ROOT}/tools/{name}', encoding='utf-8').read())]


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_missing_package_is_one_line(name):
    output, status = run(sys.executable, '-S', f'{ROOT}/{name}', '-h')         # -S: without site-packages
    message = r'error: the package \S+ is missing in .*; (first: source|install the requirements by) .*\n'
    assert re.fullmatch(message, output)
    assert status == 2


@pytest.mark.parametrize('words', [['main_single_gpu.py'], ['main_multi_gpu.py'], [
    'tools/predict.py', '-cfg', 'halonet_digits', '-pretrained', 'x', 'x.png']])
def test_a_missing_package_that_is_imported_late(words, tmp_path):
    (tmp_path / 'paddle.py').write_text('raise ModuleNotFoundError("No module named paddle", name="paddle")')
    output, status = run(sys.executable, f'{ROOT}/{words[0]}', *words[1:], PYTHONPATH=str(tmp_path))
    assert status == 2 and output.count('\n') == 1
    assert output.startswith('error: the package paddlepaddle is missing in ')


def test_other_errors_keep_their_traceback(tmp_path):
    for text in ('import tools.nothing', 'raise ImportError("a broken library")'):
        (tmp_path / 'yaml.py').write_text(text)
        output, status = run(sys.executable, f'{ROOT}/main_single_gpu.py', PYTHONPATH=f'{tmp_path}:{ROOT}')
        assert status == 1 and output.startswith('Traceback')


# ---- commands that are printed

@pytest.mark.parametrize('words', [
    ['-cfg', 'a b.yaml', '-amp'], ['-cfg', 'c.yaml', '-opts', 'OUTPUT', 'a run', 'SEED', '3'],
    ['-opts', 'MODEL.RESUME', 'auto', 'OUTPUT', 'a run'], ['-resume', 'auto', '-output', 'a run']])
def test_the_command_to_go_on_is_whole(words, monkeypatch, tmp_path):
    import config
    from training import records
    monkeypatch.chdir(tmp_path)
    for name in ('a b.yaml', 'c.yaml'):
        (tmp_path / name).write_text('SEED: 5')
    monkeypatch.setattr(sys, 'argv', ['my clone/main_single_gpu.py', *words])
    python, program, *rest = shlex.split(records.command_to_go_on('a run'))
    assert (python, program) == (sys.executable, 'my clone/main_single_gpu.py')
    again = config.parse_args(rest)
    assert (again.MODEL.RESUME, again.OUTPUT) == ('auto', 'a run')
    assert again.SEED == config.parse_args(words).SEED and again.AMP == ('-amp' in words)
    monkeypatch.setenv('PADDLE_TRAINER_ID', '0')
    assert records.command_to_go_on('a run') in (
        "the same command with -resume auto -output 'a run'",
        "the same command with -opts MODEL.RESUME auto -output 'a run'")


# ---- the launchers

def launch(tmp_path, name, *args, **env):
    """The arguments with which the launcher calls Python."""
    python = script(tmp_path / 'a python', 'for i; do echo "$i"; done')
    unset = dict.fromkeys(['CFG', 'DATA', 'BATCH_SIZE', 'PRETRAINED', 'OUTPUT'])
    output, status = run(f'{ROOT}/{name}', *args, **{**unset, 'PYTHON': python, **env})
    return output.splitlines(), status


def test_train_launcher(tmp_path):
    arguments, status = launch(tmp_path, 'run_train_multi.sh')
    common = [f'{ROOT}/main_multi_gpu.py', '-cfg', f'{ROOT}/configs/halonet_26t_256.yaml',
              '-dataset', 'imagenet2012']
    assert (arguments, status) == ([*common, '-data_path', '/dataset/imagenet'], 0)
    more = ['-amp', '-resume', 'auto']
    arguments, _ = launch(tmp_path, 'run_train_multi.sh', *more, DATA='my data', BATCH_SIZE='8', OUTPUT='out')
    assert arguments == [*common, '-data_path', 'my data', '-batch_size', '8', '-output', 'out', *more]


def test_eval_launcher(tmp_path):
    output, status = launch(tmp_path, 'run_eval_multi.sh')
    assert status == 2 and 'PRETRAINED=' in output[0]
    arguments, _ = launch(tmp_path, 'run_eval_multi.sh', '-amp', PRETRAINED='w.pdparams', BATCH_SIZE='8')
    assert arguments[5:] == ['-data_path', '/dataset/imagenet', '-eval', '-pretrained', 'w.pdparams',
                             '-batch_size_eval', '8', '-amp']


@pytest.mark.parametrize('script', ['run_train_multi.sh', 'run_eval_multi.sh'])
def test_launchers_run_under_sh_as_the_predecessors_did(script, tmp_path):
    done = subprocess.run(['sh', os.path.join(ROOT, script), '-h'], capture_output=True, text=True,
                          env={**os.environ, 'PYTHON': sys.executable, 'PRETRAINED': 'w'})
    assert done.returncode == 0 and '-data_path' in done.stdout, done.stderr


def test_launchers_speak_the_config_command_line(tmp_path):
    import config
    variables = {'PRETRAINED': 'w.pdparams', 'BATCH_SIZE': '8', 'OUTPUT': 'out'}
    arguments, _ = launch(tmp_path, 'run_eval_multi.sh', '-amp', **variables)
    parsed = config.parse_args(arguments[1:])
    assert parsed.EVAL and parsed.AMP and parsed.DATA.BATCH_SIZE_EVAL == 8 and parsed.OUTPUT == 'out'
