"""Measure speed: of evaluation in each runtime, of the attention layer, of a training step.

  python dev/benchmark.py eval -cfg configs/halonet_26t_256.yaml -pretrained W.pdparams -exported exported
  python dev/benchmark.py eval ... -also timm=halonet26t.{batch}.onnx -csv eval.csv
  python dev/benchmark.py layer -csv layer.csv
  python dev/benchmark.py train -cfg configs/halonet_26t_256.yaml -batch 16

The engines of a task are measured in turn, in random order, -rounds times. Each time is a process of its
own, because waiting threads of another runtime and the position of its memory change the speed. It warms up
once and then runs -runs times. Quote medians and ratios; numbers of different calls on a shared machine do
not compare.

`eval` measures the fused and the composed eager model, the files of tools/export.py in DIR, and with -also
the ONNX files of others. A runtime that is not installed is left out. Logits that differ by more than 1e-4
from those of the first engine are reported. OpenVINO computes in float32. `MiB` is the growth of the
process's peak of resident memory, with -device gpu the peak of memory that Paddle allocates on the GPU.

  python dev/benchmark.py train -cfg FILE -device gpu -batch 64 256 -precision float32 bfloat16 -profile

-profile counts the kernels that a run launches and how often it waits for the device, by Paddle's profiler.
Exit status: 0, or 2 for a mistake in the command.
"""
import argparse
import csv
import io
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from typing import Any, Callable, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system import cpu
from tools import cli

from dev.benchmark_cases import PRECISIONS, WHAT, Case

WIDE_INSTRUCTIONS = ('avx2', 'avx512f', 'avx512_bf16', 'amx_tile')
LIMIT = 1e-4                                        # of the largest result, for a difference between engines
PERCENTILES = (50, 90, 99)
COUNTS = ('launches', 'waits')                      # of a run, with -profile


def parser() -> cli.Parser:
    options = cli.Parser(__doc__)
    options.add_argument('what', choices=WHAT)
    options.add('cfg', 'config file of the model', metavar='FILE')
    options.add('pretrained', 'weights (default: fresh ones)', metavar='FILE', default='')
    options.add('exported', 'eval: a folder of tools/export.py', metavar='DIR')
    options.add('also', 'eval: other ONNX files; {batch} in a name stands for the batch size', nargs='+',
                default=[], metavar='NAME=FILE')
    options.add('attention', 'the attention operators to measure', nargs='+',
                choices=('fused', 'composed', 'sdpa'), default=['fused', 'composed'])
    options.add('device', 'cpu or gpu', choices=('cpu', 'gpu'), default='cpu')
    options.add('precision', f'eval and train on a GPU: {", ".join(PRECISIONS)}; float32 is without TF32',
                nargs='+', choices=PRECISIONS, default=['float32'], metavar='NAME')
    options.add('profile', 'count launches and waits of a run, too', action='store_true')
    options.add('batch', 'batch sizes', nargs='+', type=int, default=[1, 16])
    options.add('threads', 'numbers of threads (default: one per core)', nargs='+', type=int)
    options.add('rounds', 'times that each is measured', type=int, default=5)
    options.add('runs', 'runs each time', type=int, default=3)
    options.add('csv', 'file to write the table to as well', metavar='FILE')
    options.add('opts', 'any options of config.py', nargs='+', action='extend', default=[],
                metavar='KEY VALUE')
    options.add('case', argparse.SUPPRESS, type=int)                        # for the measuring processes
    options.add('answer', argparse.SUPPRESS)
    return options


def main(args: argparse.Namespace) -> int:
    if min(args.rounds, args.runs, *args.batch, *(args.threads or [1])) < 1:
        raise ValueError('-rounds, -runs, -batch and -threads must be at least 1')
    cases = []
    for threads in args.threads or [cpu.cores()]:
        cases += WHAT[args.what](args, threads)
    if args.case is not None:
        return measure(cases[args.case], args)
    cli.check_outputs(args.csv)
    if args.pretrained:
        from model import hub
        hub.find(args.pretrained)                   # raises where there is none
    machine = describe()
    print(machine, flush=True)
    rows, tasks = [], []
    for case in cases:
        if case.facts not in tasks:
            tasks.append(case.facts)
            rows += compare([other for other in cases if other.facts == case.facts], cases, args)
    if args.csv and rows:
        write_table(args.csv, [{**row, 'machine': machine} for row in rows])
    return 0


def describe() -> str:
    """Describe the machine in a line."""
    import paddle
    wide = ' '.join(name for name in WIDE_INSTRUCTIONS if name in cpu.instructions())
    return (f'{cpu.model_name()}, {cpu.cores()} cores, {wide}, load {os.getloadavg()[0]:.1f}, '
            f'Paddle {paddle.__version__}, Python {platform.python_version()}')


def write_table(path: str, rows: list[dict]) -> None:
    """Write rows as a CSV file, with three decimals."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    for row in rows:
        numbers = {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}
        table.writerow({**row, **numbers})
    cli.write_text(path, text.getvalue())


# ---- measuring

def compare(group: list[Case], cases: list[Case], args: argparse.Namespace) -> list[dict]:
    """Measure the cases of a task in turn, in processes of their own. Returns their rows of the table."""
    answers: dict[str, list[dict]] = {case.name: [] for case in group}
    for _ in range(args.rounds):
        for case in random.sample(group, len(group)):
            answer = ask(cases.index(case), case.name)
            if answer:
                answers[case.name].append(answer)
    measured = [case for case in group if answers[case.name]]
    for case in measured:
        first = answers[measured[0].name][0]['result']
        own = answers[case.name][0]['result']
        apart = difference(own, first) if first else 0.0
        if not apart <= LIMIT:                      # NaN is reported too
            print(f'{case.name}: results differ by {apart:.1e} of the largest', flush=True)
    rows: list[dict] = []
    for case in measured:
        row = summary(case, answers[case.name])
        row['ratio'] = rows[0]['p50_ms'] / row['p50_ms'] if rows else 1.0
        rows.append(row)
        print(as_line(case, row), flush=True)
    return rows


def ask(number: int, name: str) -> Optional[dict]:
    """Return what `measure` writes for a case, in a new process, or None after a line with the reason."""
    with tempfile.TemporaryDirectory() as folder:
        answer = os.path.join(folder, 'answer.json')
        done = cli.run_program([sys.executable, *sys.argv, '-case', str(number), '-answer', answer])
        if done.returncode:
            lines = done.stdout.strip().splitlines() or ['no output']
            print(f'{name}: left out: {lines[-1]}', flush=True)
            return None
        with open(answer, encoding='utf-8') as file:
            return json.load(file)


def measure(case: Case, args: argparse.Namespace) -> int:
    """Write {'seconds': of each run, 'mib': memory's growth, 'result': flat list or None} to args.answer."""
    run = case.make()
    before = resident_mib(reset=True)
    result = run()
    seconds = []
    for _ in range(args.runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    mib = gpu_mib() if args.device == 'gpu' else resident_mib() - before
    flat = None if result is None else result.flatten().tolist()
    counts = profile(run) if args.profile else {}
    with open(args.answer, 'w', encoding='utf-8') as file:
        json.dump({'seconds': seconds, 'mib': mib, 'result': flat, 'counts': counts}, file)
    return 0


def gpu_mib() -> float:
    """Return the most memory that Paddle has allocated on the GPU."""
    import paddle
    return paddle.device.cuda.max_memory_allocated() / 2 ** 20


def profile(run: Callable) -> dict[str, int]:
    """Count, in one run, the kernels that Paddle launches and the calls of CUDA that wait for the device."""
    from paddle import profiler
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'trace.json')
        with profiler.Profiler(on_trace_ready=lambda recorder: recorder.export(path, 'json')):
            run()
        with open(path, encoding='utf-8') as file:
            events = json.load(file)['traceEvents']
    launches = sum(event.get('cat') == 'DygraphKernelLaunch' for event in events)
    waits = sum('Synchronize' in event.get('name', '') for event in events)
    return {'launches': launches, 'waits': waits}


def resident_mib(reset: bool = False) -> float:
    """Return the peak of this process's resident memory; with `reset`, start it from the present memory.

    That of getrusage starts with the parent's.
    """
    if reset:
        with open('/proc/self/clear_refs', 'w', encoding='ascii') as file:
            file.write('5')
    with open('/proc/self/status', encoding='ascii') as file:
        for line in file:
            if line.startswith('VmHWM'):
                return int(line.split()[1]) / 1024
    raise OSError('/proc/self/status has no VmHWM')


def difference(result: Any, expected: Any) -> float:
    """Return the largest difference over the largest expected number, or NaN."""
    import numpy as np
    return float(np.abs(np.subtract(result, expected)).max() / np.abs(expected).max())


def summary(case: Case, answers: list[dict]) -> dict:
    """Return an engine's row of the table: percentiles of the latency in ms, images/s and memory."""
    seconds = [value for answer in answers for value in answer['seconds']]
    cuts = seconds * 99
    if len(seconds) > 1:
        cuts = statistics.quantiles(seconds, n=100, method='inclusive')
    row: dict = {**case.facts, 'engine': case.name}
    for percent in PERCENTILES:
        row[f'p{percent}_ms'] = cuts[percent - 1] * 1e3
    row['images_per_s'] = case.images / cuts[49]
    row['best_images_per_s'] = case.images / min(seconds)
    row['ratio'] = 1.0                              # of the first engine's latency to this one's
    row['mib'] = statistics.median(answer['mib'] for answer in answers)
    row.update(answers[0].get('counts', {}))
    return row


def as_line(case: Case, row: dict) -> str:
    """Format a row of the table for the console."""
    task = ' '.join(f'{key} {value}' for key, value in case.facts.items())
    return (f'{task}  {case.name:18} p50 {row["p50_ms"]:8.1f} ms  p90 {row["p90_ms"]:8.1f}  '
            f'p99 {row["p99_ms"]:8.1f}  {row["images_per_s"]:7.2f} images/s  x{row["ratio"]:.2f}  '
            f'{row["mib"]:6.0f} MiB' + ''.join(f'  {row[key]} {key}' for key in COUNTS if key in row))


if __name__ == '__main__':
    parser().run(main)
