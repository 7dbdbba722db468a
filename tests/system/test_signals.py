"""Programs end at SIGTERM at any moment, and with the program that started them."""
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from system import stopping

import pytest
from runs import ROOT, TINY, make_images, options, processes, program, start, wait_for_step, wait_until


def has_setpriv():
    """True if the scripts can tie a program to themselves."""
    command = ['setpriv', '--pdeathsig', 'KILL', 'true']
    return shutil.which('setpriv') is not None and subprocess.run(command, check=False).returncode == 0


guarded = pytest.mark.skipif(not has_setpriv(), reason='no setpriv of util-linux 2.33')


def ends_with(process, log, seconds=10):
    """Kill `process`, and wait until all that it has started is gone."""
    process.kill()
    process.wait()
    wait_until(lambda: not processes(log), seconds, f'no process left: {processes(log)}')


# ---- SIGTERM

@pytest.mark.parametrize('imports, handler, caught', [
    ('ops', 'signal.SIG_DFL', 0), ('paddle, utils', 'signal.SIG_DFL', 0),
    ('utils', "lambda *_: print('called')", 1)])
def test_paddles_handler_of_sigterm_is_removed(imports, handler, caught):
    """It may wait for ever, in a fork above all. A handler of the caller stays."""
    code = f'''
import signal
signal.signal(signal.SIGTERM, {handler})
import {imports}
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print([int(status[name], 16) >> signal.SIGTERM - 1 & 1 for name in ('SigBlk', 'SigIgn', 'SigCgt')])
signal.raise_signal(signal.SIGTERM)
'''
    done = program('-c', code, check=False)
    assert done.returncode == (0 if caught else -signal.SIGTERM) and 'FatalError' not in done.stderr
    assert done.stdout.splitlines() == [f'[0, 0, {caught}]', *['called'] * caught]


def test_tests_end_at_sigterm():
    with open('/proc/self/status', encoding='ascii') as file:
        status = dict(line.split(':', 1) for line in file)
    assert not int(status['SigCgt'], 16) >> signal.SIGTERM - 1 & 1


def test_sigterm_during_the_import_of_paddle_ends_the_program(tmp_path):
    """From the start of Python to well after the import; Paddle's handler prints nothing."""
    code = 'import utils, time; time.sleep(100)'
    for moment in (0.1, 0.8, 1.6):
        process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        time.sleep(moment)
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGTERM and 'FatalError' not in err, moment


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with data/, and run/ of a tiny training."""
    folder = tmp_path_factory.mktemp('trained')
    make_images(folder / 'data')
    for name in 'ab':
        shutil.copytree(folder / 'data' / 'val', folder / 'classes' / name)
    for part, name in (('train', 'n01440764_1.JPEG'), ('val', 'ILSVRC2012_val_00000001.JPEG')):
        copy = folder / 'imagenet' / part / 'n01440764' / name
        copy.parent.mkdir(parents=True)
        shutil.copy(folder / 'data' / 'val' / '0.png', copy)
    program('main_single_gpu.py', '-data_path', folder / 'data', '-output', folder / 'run', *options(TINY))
    run = folder / 'run'
    (folder / 'list.csv').write_text(f'cfg,pretrained\n{run}/config.yaml,{run}/final.pdparams\n')
    return folder


WORKER = 'DATA.NUM_WORKERS 1 DATA.BATCH_SIZE 4'
LOADED = '-pretrained FOLDER/run/final -data_path FOLDER/data'
PROGRAMS = {                                        # and their exit codes; FOLDER is `trained`, OUT is empty
    'main_single_gpu.py -data_path FOLDER/data -output OUT/run -opts TINY DATA.NUM_WORKERS 2': {75},
    f'main_multi_gpu.py -nprocs 2 -data_path FOLDER/data -output OUT/run -opts TINY {WORKER}': {75},
    f'main_single_gpu.py -eval {LOADED} -output OUT/run -opts TINY': {75},
    'tools/eval_all.py FOLDER/list.csv -data_path FOLDER/data -results OUT/results.csv': {},
    'tools/predict.py -pretrained FOLDER/run/final FOLDER/data/val -html OUT/a.html': {},
    'tools/probe.py -pretrained FOLDER/run/final -data_path FOLDER/data -results OUT/a.csv -k 3': {},
    'tools/visualize.py -pretrained FOLDER/run/final FOLDER/data/val/0.png -output OUT/a.png': {},
    'tools/verify_gpu.py -output OUT -device cpu -rows ranks deaths': {},
    'tools/metrics.py FOLDER/run -output OUT/metrics': {},
    'tools/follow.py FOLDER/run -to tensorboard -output OUT/curves': {},
    'tools/report.py FOLDER/run -output OUT/report.html': {},
    'tools/check_data.py FOLDER/data -workers 2': {},
    'tools/make_lists.py FOLDER/classes -force': {},
    'tools/prepare_imagenet.py FOLDER/imagenet -unpack OUT/unpacked': {1},
    'tools/make_digits.py OUT/digits': {},
    'tools/export.py -pretrained FOLDER/run/final -format paddle -output OUT/export': {},
    'tools/infer.py FOLDER/data/val/0.png': {2},             # it belongs to an exported folder
    'dev/benchmark.py eval -cfg FOLDER/run/config.yaml -csv OUT/a.csv': {},
    'tools/port_weights.py FOLDER/run/final.pdparams OUT/a.safetensors -cfg FOLDER/run/config.yaml': {},
    'dev/model_table.py -check': {},
    '-m ops': {}}


@pytest.mark.slow
@pytest.mark.parametrize('line', PROGRAMS)
def test_program_ends_at_sigterm_at_any_moment(trained, tmp_path, log, line):
    """Before, during and after the import of Paddle: in time, by a documented code, leaving no process."""
    for moment in (0.05, 0.4, 1.0, 2.0, 4.0):
        shutil.rmtree(tmp_path / 'out', ignore_errors=True)
        (tmp_path / 'out').mkdir()
        words = line.replace('FOLDER', str(trained)).replace('OUT', str(tmp_path / 'out')).split()
        words = [str(value) for word in words for value in (TINY if word == 'TINY' else [word])]
        process = start(*words, log=log, HALONET_OPS_CACHE=os.path.expanduser('~/.cache/halonet/ops'))
        with suppress(subprocess.TimeoutExpired):   # a program that has ended needs no signal
            process.wait(moment)
        process.terminate()
        code = process.wait(60)
        assert code in {0, -signal.SIGTERM, *PROGRAMS[line]}, (moment, log.read_text())
        wait_until(lambda: not processes(log), 20, f'no process left: {processes(log)}')


def test_every_tool_is_among_the_programs():
    paths = Path(ROOT, 'tools').glob('*.py')
    tools = {f'tools/{path.name}' for path in paths if "__name__ == '__main__'" in path.read_text()}
    assert tools <= {line.split()[0] for line in PROGRAMS}


# ---- Stop

def in_a_fork(work):
    """The wait status of a forked process that calls `work`; 1 where it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work() or 0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_second_interrupt_ends_at_once():
    def work():
        stop = stopping.Stop().listen()
        # What a terminal and a launcher send for one Ctrl-C
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        wait_until(lambda: stop.requested, 5, 'the first is noted')
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert in_a_fork(work) == 130


def test_forked_process_is_ended_by_its_own_signals_only():
    def work():
        stopping.Stop().listen()

        def worker():
            os.kill(os.getpid(), signal.SIGTERM)     # before: nobody listens in the fork, and it waits
            stopping.Stop.unlisten()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return -in_a_fork(worker)
    assert in_a_fork(work) == signal.SIGINT


# ---- the end of a parent

def sleeping_python(tmp_path, *names):
    """A Python that sleeps where its arguments hold one of `names`, and else succeeds."""
    path = tmp_path / 'python'
    condition = ' || '.join(f'[[ "$*" == *{name}* ]]' for name in names)
    path.write_text(f'#!/bin/bash\n{condition} && exec sleep 100\nexit 0\n')
    path.chmod(0o755)
    return path


def sleeps(log):
    """True if the sleeping Python of this run has started."""
    return any(command.startswith('sleep') for command in processes(log).values())


@guarded
@pytest.mark.parametrize('script, nodes', [
    ('run_train_multi.sh', 1), ('run_train_multi.sh', 2), ('run_eval_multi.sh', 1)])
def test_program_ends_with_its_script(tmp_path, log, script, nodes):
    python = sleeping_python(tmp_path, 'main_multi_gpu.py')
    variables = {'PRETRAINED': 'w', 'NNODES': str(nodes), 'NODE_RANK': '0', 'MASTER': 'host:1'}
    process = start(script, log=log, PYTHON=str(python), **variables)
    wait_until(lambda: sleeps(log), 10, 'it has started')
    ends_with(process, log)


@guarded
def test_demo_ends_with_its_script(tmp_path, log):
    for name in ('run_demo.sh', 'tools/usage.sh'):
        os.makedirs((tmp_path / name).parent, exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    (tmp_path / 'tools' / 'setup_env.sh').write_text('#!/bin/sh\n')
    (tmp_path / 'tools' / 'setup_env.sh').chmod(0o755)
    python = sleeping_python(tmp_path, 'main_single_gpu.py')
    (tmp_path / '.venv' / 'bin').mkdir(parents=True)
    python.rename(tmp_path / '.venv' / 'bin' / 'python')
    script = tmp_path / 'run_demo.sh'
    process = subprocess.Popen([script], stdout=log.open('w'), stderr=subprocess.STDOUT, cwd=tmp_path,
                               env={**os.environ, 'RUN_OF_TEST': str(log)})
    wait_until(lambda: sleeps(log), 10, 'it has started')
    second = subprocess.run([script], capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 2 and 'another demo is running' in second.stderr
    ends_with(process, log)


@pytest.mark.parametrize('code', [
    "from tools import cli; cli.run_program(['sleep', '100'])",
    "import time; from tools import check_data\ndef slow(*_, **__): time.sleep(100)\n"
    "check_data.read = slow; check_data.main(check_data.parser().parse_args(['DATA', '-workers', '2']))"])
def test_processes_of_a_tool_end_with_it(tmp_path, log, code):
    process = start('-c', code.replace('DATA', make_images(tmp_path / 'data')), log=log)
    wait_until(lambda: len(processes(log)) > 1, 20, f'it has started another: {log.read_text()}')
    time.sleep(0.3)
    assert process.poll() is None, log.read_text()
    ends_with(process, log)


@guarded
@pytest.mark.slow
def test_training_ends_with_its_script(tmp_path, log):
    """With two processes and their data workers; and another start goes on from its checkpoint."""
    data = make_images(tmp_path / 'data')
    opts = [*TINY, 'DATA.NUM_WORKERS', 1, 'DATA.BATCH_SIZE', 4, 'TRAIN.NUM_EPOCHS', 200]
    words = ['-resume', 'auto', *options(opts)]
    variables = {'DATA': data, 'OUTPUT': str(tmp_path / 'run'), 'NPROCS': '2', 'MAX_RESTARTS': '1'}
    process = start('run_train_multi.sh', *words, log=log, **variables)
    wait_for_step(tmp_path / 'run', 3, process)
    assert len(processes(log)) > 4
    ends_with(process, log)
    process = start('run_train_multi.sh', *words, log=log, **variables)
    wait_for_step(tmp_path / 'run', 10, process)
    process.terminate()
    assert process.wait(60) == stopping.STOPPED and 'resumed from' in log.read_text()
