"""tools/slurm.sh with a pretended scheduler: two machines, a stop in time, and the queue again."""
import os
import signal
import socket
import subprocess
from contextlib import suppress

import pytest
from exact_runs import TWO, assert_same_run
from runs import ROOT, TINY, kill_all, processes, start, wait_for_step, wait_until

from config import get_config

SRUN = '''#!/usr/bin/env bash
# As srun: the command once for each node; signals go to the tasks; the highest exit code is the result.
while [[ $1 == --* ]]; do shift; done
tasks=()
for (( node = 0; node < SLURM_JOB_NUM_NODES; node++ )); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
    wait "$task" || { one=$?; (( one > code )) && code=$one; }
done
exit "$code"
'''
SCONTROL = '''#!/bin/sh
echo "$@" >> "$CALLS"
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; fi
'''


@pytest.fixture
def cluster(tmp_path):
    """Return the environment of a job of two nodes, with pretended programs of SLURM on its PATH."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.create_server(('', 0)) as free:
        port = free.getsockname()[1]
    return {'PATH': f'{folder}:{os.environ["PATH"]}', 'CALLS': str(tmp_path / 'calls'),
            'SLURM_JOB_ID': str(port), 'SLURM_JOB_NUM_NODES': '2', 'SLURM_JOB_NODELIST': 'node[1-2]'}


@pytest.mark.parametrize('left_out, message', [
    ('SLURM_JOB_ID', 'without SLURM there is ./run_train_multi.sh'), ('OUTPUT', 'OUTPUT is missing')])
def test_mistakes_are_named(cluster, left_out, message):
    environment = {**os.environ, **cluster, 'OUTPUT': 'out'}
    del environment[left_out]
    done = subprocess.run(['tools/slurm.sh'], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('codes, code, queued', [
    ([0, 0], 0, False), ([75, 75], 0, True), ([1, 0], 1, False), ([75, 1], 0, True), ([2, 2], 2, False)])
def test_only_a_stopped_job_goes_back_to_the_queue(cluster, tmp_path, codes, code, queued):
    """Each task has its number, the first node's address and the options; the highest code counts."""
    (tmp_path / 'root').mkdir()
    program = tmp_path / 'root' / 'run_train_multi.sh'
    program.write_text(f'#!/usr/bin/env bash\ncodes=({" ".join(map(str, codes))})\n'
                       f'echo "$NODE_RANK $NNODES $MASTER $@" > {tmp_path}/task$NODE_RANK\n'
                       'exit ${codes[NODE_RANK]}\n')
    program.chmod(0o755)
    environment = {**os.environ, **cluster, 'OUTPUT': 'out'}
    done = subprocess.run([f'{ROOT}/tools/slurm.sh', '-amp'], cwd=program.parent, capture_output=True,
                          text=True, env=environment, timeout=60)
    assert done.returncode == code, done.stderr
    calls = (tmp_path / 'calls').read_text()
    assert (f'requeue {cluster["SLURM_JOB_ID"]}' in calls) == queued
    master = f'127.0.0.1:{20000 + int(cluster["SLURM_JOB_ID"]) % 20000}'
    for rank in (0, 1):
        assert (tmp_path / f'task{rank}').read_text() == f'{rank} 2 {master} -amp -resume auto\n'


@pytest.mark.slow
def test_preempted_job_ends_with_the_bytes_of_an_uninterrupted_run(cluster, images, two, tmp_path):
    """SLURM sends SIGTERM to every process of the tasks; the job is queued, and starts again."""
    folder, log = tmp_path / 'run', tmp_path / 'output.txt'
    (tmp_path / 'tiny.yaml').write_text(get_config(None, [*TINY, *TWO]).dump())
    variables = {**cluster, 'CFG': str(tmp_path / 'tiny.yaml'), 'OUTPUT': str(folder), 'DATA': images,
                 'NPROCS': '1'}
    try:
        job = start('tools/slurm.sh', log=log, **variables)
        wait_for_step(folder, 10, job, 120)
        tasks = [pid for pid, command in processes(log).items()
                 if 'slurm.sh' not in command and '/bin/srun' not in command]
        assert len(tasks) >= 6                      # of each node: the script, the launcher, the training
        for pid in tasks:
            with suppress(ProcessLookupError):      # the signal to another one has ended it
                os.kill(pid, signal.SIGTERM)
        assert job.wait(120) == 0, log.read_text()
        assert f'requeue {cluster["SLURM_JOB_ID"]}' in (tmp_path / 'calls').read_text()
        wait_until(lambda: not processes(log), 60, f'no process left: {processes(log)}')
        job = start('tools/slurm.sh', log=log, **variables)
        assert job.wait(200) == 0, log.read_text()
    finally:
        kill_all(log)
    assert 'resumed from' in (folder / 'log_rank1.txt').read_text()
    assert_same_run(folder, two)
