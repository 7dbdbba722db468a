"""The Dockerfile: its steps, run for a CPU in a copy of the repository. No container is built."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

APT = 'apt-get update'                              # the step that installs programs of Debian
PROGRAMS = {'g++': 'g++', 'git': 'git', 'util-linux': 'setpriv'}             # by Debian's package


def steps():
    """The instructions of the Dockerfile, (name, text), with continued lines joined."""
    text = Path(ROOT, 'Dockerfile').read_text(encoding='utf-8').replace('\\\n', ' ')
    lines = [line for line in text.splitlines() if line and not line.startswith('#')]
    return [(line.split()[0], ' '.join(line.split()[1:])) for line in lines]


def ignored(folder, names):
    """Those of `names` in `folder` that .dockerignore leaves out, for shutil.copytree."""
    patterns = Path(ROOT, '.dockerignore').read_text(encoding='utf-8').split()
    left_out = set()
    for name in names:
        path = Path(os.path.relpath(os.path.join(folder, name), ROOT))
        anywhere = [pattern[len('**/'):] for pattern in patterns if pattern.startswith('**/')]
        at_root = [pattern for pattern in patterns if not pattern.startswith('**/')]
        if any(path.match(pattern) for pattern in anywhere):
            left_out.add(name)
        if len(path.parts) == 1 and any(path.match(pattern) for pattern in at_root):
            left_out.add(name)
    return left_out


def test_image_has_what_the_project_asks_for():
    found = steps()
    image = dict(found)['FROM']
    version = re.fullmatch(r'python:(3\.\d+)-slim-\w+', image)[1]
    assert version in ('3.9', '3.10', '3.11', '3.12', '3.13')                # tools/setup_env.sh: Paddle's
    apt = next(text for name, text in found if name == 'RUN' and text.startswith(APT))
    assert set(PROGRAMS) <= set(apt.split())
    assert ('CMD', '["./run_demo.sh"]') in found


def test_paddle_for_gpus_is_that_of_the_readme():
    readme = Path(ROOT, 'README.md').read_text(encoding='utf-8')
    asked = re.search(r'pip install (paddlepaddle-gpu==\S+) -i (\S+/)cu\d+/', readme)
    install = next(text for name, text in steps() if name == 'RUN' and 'paddlepaddle-gpu' in text)
    assert f'pip install --no-cache-dir {asked[1]} -i "{asked[2]}$CUDA/"' in install
    pinned = Path(ROOT, 'requirements.txt').read_text(encoding='utf-8')
    assert asked[1].replace('-gpu', '') in pinned


def test_results_and_weights_do_not_enter_the_image():
    names = {'.venv', 'demo', 'runs', 'exported_26t', 'w.pdparams', 'README.md', 'tests', '.git'}
    assert ignored(ROOT, names) == {'.venv', 'demo', 'runs', 'exported_26t', 'w.pdparams'}
    assert ignored(os.path.join(ROOT, 'tests'), {'demo', '__pycache__', 'conftest.py'}) == {'__pycache__'}


@pytest.mark.slow
def test_steps_for_a_cpu_run(tmp_path):
    """With this environment in place of a new one, and Debian's programs as they are here."""
    missing = [program for program in PROGRAMS.values() if not shutil.which(program)]
    if missing:
        pytest.skip(f'not on PATH: {", ".join(missing)}')
    copy = tmp_path / 'halonet'
    environment = {**os.environ, 'CUDA': ''}
    for name, text in steps():
        if name == 'COPY':
            assert text == '. .'
            shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
        elif name == 'RUN' and text == 'python3 -m venv .venv':
            (copy / '.venv').symlink_to(sys.prefix)
            stamp = copy / '.venv' / '.installed-requirements-dev.txt'
            if not stamp.exists():
                pytest.skip(f'{sys.prefix} was not made by tools/setup_env.sh, which would change it')
        elif name == 'RUN' and not text.startswith(APT):
            done = subprocess.run(text, shell=True, cwd=copy, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f'{text}: {done.stdout}{done.stderr}'
    short = ['-opts', 'TRAIN.NUM_EPOCHS', '1', 'TRAIN.WARMUP_EPOCHS', '0']
    for words in (['./run_tests.sh', 'tests/test_config.py'], ['./run_demo.sh', *short]):
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f'{shlex.join(words)}: {done.stdout}{done.stderr}'
    assert (copy / 'demo' / 'run' / 'final.pdparams').exists()
