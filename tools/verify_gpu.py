"""Check on the first GPU, or on several, what was only tested on a CPU: numbers, failures, speed.

  python tools/verify_gpu.py -output verified
  NVIDIA_TF32_OVERRIDE=0 python tools/verify_gpu.py -output verified -rows forward attention

It takes about ten minutes. Each row runs in a process of its own, with a time limit. DIR gets verify_gpu.json
and verify_gpu.html, with the expected and the measured value of each check; both are written after each row.
Without a GPU the rows run that a CPU can answer, and the others stay open.
Exit status: 0, 1 if a check fails, or 2 for a mistake in the command.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli, gpu_checks
from tools.gpu_runs import FAILED, NOTED, OPEN, PASSED, Check, Machine, finish, start_python

HEAD = 'check', 'expected', 'measured', 'state'


@dataclass
class Row:
    """A group of checks, and how long it took."""
    name: str
    what: str                                       # is checked
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)

    @property
    def state(self) -> str:
        """FAILED if a check has failed, else PASSED or NOTED if one has, else OPEN."""
        states = {check.state for check in self.checks}
        for state in (FAILED, PASSED, NOTED):
            if state in states:
                return state
        return OPEN


def parser() -> cli.Parser:
    options = cli.Parser(__doc__)
    options.add('output', 'folder for the results', metavar='DIR', required=True)
    options.add('rows', f'the rows to check (default: all): {", ".join(gpu_checks.ROWS)}', nargs='+',
                choices=gpu_checks.ROWS, default=list(gpu_checks.ROWS), metavar='ROW')
    options.add('device', 'gpu or cpu (default: a GPU if there is one)', choices=('gpu', 'cpu'))
    options.add('answer', argparse.SUPPRESS)        # for the process of one row
    options.add('gpus', argparse.SUPPRESS, type=int)
    return options


def main(args: argparse.Namespace) -> int:
    if args.answer:
        return check(args)
    os.makedirs(args.output, exist_ok=True)
    device, gpus = find_device(args.device)
    print(f'checking {f"{gpus} GPU(s)" if device == "gpu" else "what a CPU can answer"}', flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix='verify-') as folder:
        for name in args.rows:
            rows.append(run_row(name, Machine(device, gpus, folder)))
            show(rows[-1])
            write(args.output, rows, device, gpus)
    counts = [f'{sum(row.state == state for row in rows)} {state}' for state in (PASSED, FAILED, NOTED, OPEN)]
    print(f'rows: {", ".join(counts)}; {os.path.join(args.output, "verify_gpu.html")}')
    return int(any(row.state == FAILED for row in rows))


def find_device(device: str) -> tuple[str, int]:
    """Return gpu or cpu, and the number of GPUs, from a process of its own: this one starts others."""
    code = f'import sys; sys.path.insert(0, {cli.ROOT!r}); import utils; print(utils.gpu_count())'
    done = cli.run_program([sys.executable, '-c', code])
    if done.returncode:
        raise ValueError(f'Paddle does not start: {done.stdout.strip().splitlines()[-1]}')
    gpus = int(done.stdout.split()[-1])
    if device == 'gpu' and not gpus:
        raise ValueError('-device gpu: Paddle sees no GPU here; look at nvidia-smi and CUDA_VISIBLE_DEVICES')
    return device or ('gpu' if gpus else 'cpu'), gpus


# ---- a row in its process

def check(args: argparse.Namespace) -> int:
    """Run the checks of one row, and write each as a line of JSON to args.answer as it comes."""
    function, _ = gpu_checks.ROWS[args.rows[0]]
    with open(args.answer, 'a', encoding='utf-8') as file:
        for result in function(Machine(args.device, args.gpus, args.output)):
            file.write(json.dumps(asdict(result)) + '\n')
            file.flush()
    return 0


def run_row(name: str, machine: Machine) -> Row:
    """Run a row in a process of its own, and return its checks. An error or a hang is a failed check."""
    function, limit = gpu_checks.ROWS[name]
    row = Row(name, (function.__doc__ or '').splitlines()[0])
    answer = Path(machine.folder, f'{name}.jsonl')
    words = ['-output', machine.folder, '-rows', name, '-device', machine.device, '-gpus', str(machine.gpus),
             '-answer', str(answer)]
    began = time.monotonic()
    code, output = finish(start_python(os.path.abspath(__file__), *words), limit)
    if code:
        lines = output.strip().splitlines() or ['no output']
        row.checks.append(Check('end', 'exit code 0', f'exit code {code}: {lines[-1]}', FAILED))
    row.seconds = time.monotonic() - began
    if answer.exists():
        lines = answer.read_text(encoding='utf-8').splitlines()
        row.checks[:0] = [Check(**json.loads(line)) for line in lines]
    return row


# ---- results

def show(row: Row) -> None:
    """Print a row and its checks."""
    print(f'{row.state:6}  {row.name}  ({row.seconds:.0f} s)  {row.what}', flush=True)
    for result in row.checks:
        expected = f'  (expected: {result.expected})' if result.expected else ''
        print(f'        {result.state:6}  {result.name}: {result.measured}{expected}', flush=True)


def write(folder: str, rows: list[Row], device: str, gpus: int) -> None:
    """Write verify_gpu.json and verify_gpu.html."""
    content = [{'row': row.name, 'what': row.what, 'state': row.state, 'seconds': round(row.seconds, 1),
                'checks': [asdict(result) for result in row.checks]} for row in rows]
    facts = {'device': device, 'gpus': gpus, 'rows': content}
    cli.write_text(os.path.join(folder, 'verify_gpu.json'), json.dumps(facts, indent=1) + '\n')
    from reporting.templates import render
    where = f'{gpus} GPU(s)' if device == 'gpu' else 'CPU: rows that need a GPU are open'
    tables = []
    for row in rows:
        cells = [(result.name, result.expected, result.measured, result.state) for result in row.checks]
        tables.append((row, {'kind': 'options', 'head': HEAD, 'rows': cells}))
    page = render('verify.html', title='Verification', tables=tables, where=where, script='hover.js')
    cli.write_text(os.path.join(folder, 'verify_gpu.html'), str(page))


if __name__ == '__main__':
    parser().run(main)
