"""run_train_multi.sh and run_eval_multi.sh: starting again after failures, on one machine and on two."""
import os
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager

import pytest
from exact_runs import TWO, assert_same_run
from runs import ROOT, TINY, kill_all, leaves, processes, start, wait_for_step, wait_until

from config import get_config


@pytest.fixture
def fake(tmp_path):
    """A Python that writes down how it is called and ends with the next of the `codes` in a file."""
    path = tmp_path / 'python'
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncode=$(head -n 1 {tmp_path}/codes)\n'
                    f'sed -i 1d {tmp_path}/codes\nexit $code\n')
    path.chmod(0o755)
    (tmp_path / 'sleep').write_text('#!/bin/sh\n')                           # no pause between two starts
    (tmp_path / 'sleep').chmod(0o755)

    def call(script, codes, **variables):
        (tmp_path / 'codes').write_text(''.join(f'{code}\n' for code in codes))
        path_first = f'{tmp_path}:{os.environ["PATH"]}'
        environment = {'PYTHON': str(path), 'PATH': path_first, 'PRETRAINED': 'w', **variables}
        done = subprocess.run([f'./{script}', '-amp'], cwd=ROOT, env=environment, capture_output=True,
                              text=True, timeout=30)
        calls = (tmp_path / 'calls').read_text().splitlines() if (tmp_path / 'calls').exists() else []
        return done.returncode, calls, done.stderr
    return call


@pytest.mark.parametrize('codes, restarts, code, calls', [
    ([0], 3, 0, 1), ([1], 0, 1, 1), ([1, 1, 0], 3, 0, 3), ([137, 1, 1], 2, 1, 3), ([1, 75], 3, 75, 2),
    ([2], 3, 2, 1)])
def test_script_restarts_after_failures_only(fake, codes, restarts, code, calls):
    """Neither after a stop (75) nor after a mistake (2)."""
    status, lines, err = fake('run_train_multi.sh', codes, MAX_RESTARTS=str(restarts), OUTPUT='out')
    assert (status, len(lines)) == (code, calls), err
    assert [line.endswith('-amp -resume auto') for line in lines] == [False] + [True] * (calls - 1)
    assert err.count('starting again') == calls - 1


def test_restarted_evaluation_has_the_same_options(fake):
    code, (first, second), _ = fake('run_eval_multi.sh', [1, 0], MAX_RESTARTS='1', OUTPUT='out')
    assert code == 0 and first == second


@pytest.mark.parametrize('variables, message', [
    ({'MAX_RESTARTS': '1'}, 'MAX_RESTARTS needs OUTPUT'),
    ({'NNODES': '2', 'NODE_RANK': '0'}, 'MASTER=host:port'),
    ({'NNODES': '2', 'MASTER': 'a:1'}, 'NODE_RANK=0..')])
def test_script_names_missing_variables(fake, variables, message):
    code, calls, err = fake('run_train_multi.sh', [0], **variables)
    assert (code, calls) == (2, []) and message in err


def test_script_on_several_machines_and_processes(fake):
    variables = {'NNODES': '2', 'NODE_RANK': '1', 'MASTER': 'host:8000', 'NPROCS': '4', 'OUTPUT': 'out'}
    _, (call,), _ = fake('run_train_multi.sh', [0], **variables)
    assert call.startswith('-m paddle.distributed.launch --nnodes 2 --rank 1 --master host:8000 --log_dir '
                           f'out/launch_1 --nproc_per_node 4 {ROOT}/main_multi_gpu.py -cfg ')
    _, calls, _ = fake('run_train_multi.sh', [0], NPROCS='4')
    assert ' -nprocs 4 -amp' in calls[1] and 'launch' not in calls[1]


@pytest.mark.parametrize('nodes, ended, code', [
    ('1', 75, 75), ('1', 2, 2), ('1', 0, 0), ('1', 143, 75), ('2', 15, 75), ('1', 1, 1)])
def test_stopped_script_stops_the_program_and_does_not_restart(tmp_path, log, nodes, ended, code):
    python = tmp_path / 'python'
    python.write_text(f'#!/bin/bash\ntrap "exit {ended}" TERM\ntouch {tmp_path}/up\n'
                      'while :; do read -t 0.1 <> <(:); done\n')
    python.chmod(0o755)
    variables = {'OUTPUT': 'out', 'MAX_RESTARTS': '3', 'NNODES': nodes, 'NODE_RANK': '0', 'MASTER': 'host:1'}
    process = start('run_train_multi.sh', log=log, PYTHON=str(python), **variables)
    wait_until((tmp_path / 'up').exists, 20, 'the program is up')
    process.terminate()
    assert leaves(process, log) == code and 'starting again' not in log.read_text()


def test_script_gives_the_code_of_a_program_that_ends_while_the_signal_is_handled(tmp_path):
    """The signal ends the script's waiting with another code."""
    up = tmp_path / 'up'
    program = f'trap "exit 3" TERM; touch {up}; while :; do read -t 0.1 <> <(:); done'
    script = f"""
        root={ROOT} options=() again=() start=(bash -c '{program}') NNODES=1 MAX_RESTARTS=0
        source {ROOT}/tools/run_multi.sh
        stop_child() {{ kill -TERM "$child"; sleep 1; }}
        run_multi"""
    with subprocess.Popen(['bash', '-c', script]) as process:
        try:
            wait_until(up.exists, 20, 'the program is up')
            process.terminate()
            assert process.wait(20) == 3
        finally:
            process.kill()                          # leaving the block waits for it


@contextmanager
def machines():
    """Two machines, as joined network namespaces: [(address, network interface, prefix of commands)]."""
    names = [f'halonet{os.getpid()}{i}' for i in 'ab']
    addresses = ['10.77.31.1', '10.77.31.2']
    commands = [f'netns add {names[0]}', f'netns add {names[1]}',
                f'link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}']
    found = []
    for name, address in zip(names, addresses):
        inside = [f'addr add {address}/24 dev {name}', f'link set {name} up', 'link set lo up']
        commands += [f'-n {name} {command}' for command in inside]
        found.append((address, name, ['ip', 'netns', 'exec', name]))
    try:
        for command in commands:
            subprocess.run(['ip', *command.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f'no network namespaces here ({error}): both machines are this one')
        found = [('127.0.0.1', 'lo', [])] * 2
    try:
        yield found
    finally:
        for name in names if shutil.which('ip') else ():
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


@pytest.mark.slow
def test_run_on_two_machines_is_bit_identical_after_a_kill(images, two, tmp_path):
    """One process in each of two network namespaces, or two on the loopback; both scripts restart."""
    folder, logs = tmp_path / 'run', [tmp_path / f'output{i}.txt' for i in (0, 1)]
    (tmp_path / 'tiny.yaml').write_text(get_config(None, [*TINY, *TWO]).dump())
    variables = {'CFG': str(tmp_path / 'tiny.yaml'), 'OUTPUT': str(folder), 'DATA': images, 'NNODES': '2',
                 'NPROCS': '1', 'MAX_RESTARTS': '1'}
    with machines() as found, socket.create_server(('', 0)) as free:
        variables['MASTER'] = f'{found[0][0]}:{free.getsockname()[1]}'
        free.close()
        nodes = []
        for log, (address, interface, prefix) in zip(logs, found):
            own = {'NODE_RANK': str(len(nodes)), 'POD_IP': address, 'GLOO_SOCKET_IFNAME': interface}
            nodes.append(start('run_train_multi.sh', log=log, prefix=prefix, **own, **variables))
        try:
            wait_for_step(folder, 10, nodes[0], 120)
            trainer = min(pid for pid, command in processes(logs[1]).items()      # and then its data worker
                          if 'main_multi_gpu.py' in command and 'launch' not in command)
            os.kill(trainer, signal.SIGKILL)
            assert [node.wait(200) for node in nodes] == [0, 0], [log.read_text() for log in logs]
        finally:
            kill_all(*logs)
    assert all('starting again (1 of 1)' in log.read_text() for log in logs)
    assert 'resumed from' in (folder / 'log_rank1.txt').read_text()
    assert_same_run(folder, two)
