"""Measure speed: of evaluation in each runtime, of the attention layer, of a training step.

  python dev/benchmark.py eval -cfg configs/halonet_26t_256.yaml -pretrained W.pdparams -exported exported -batch 1 16
  python dev/benchmark.py eval ... -also timm=halonet26t.{batch}.onnx -csv eval.csv
  python dev/benchmark.py layer -csv layer.csv
  python dev/benchmark.py train -cfg configs/halonet_26t_256.yaml -batch 16

What is compared is measured in turn, in random order, -rounds times: each time in a process of its own, for neither the waiting
threads of another runtime nor the place of its memory shall matter, once to warm up, then -runs times. Quote the medians and
the ratios; figures of different calls on a shared machine do not compare. `eval` takes the fused and composed eager model, the
files of tools/export.py in DIR, and with -also the ONNX files of others; a runtime that is not installed is left out, and
logits that differ by more than 1e-4 from the first engine's are said. OpenVINO computes in float32. `MiB` is by how much the
process's peak of resident memory grew while it ran. Exit status: 0, or 2 for a mistake in the command.
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
from dataclasses import dataclass
from functools import partial
from typing import Callable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system import cpu, paddle_internals
from tools import cli, runtimes

LAYERS = [  # batch, channels, side, heads, stride, block, halo: those of the networks of 26 layers, and two at high resolution
    (16, 256, 16, 8, 1, 8, 2), (16, 512, 16, 8, 2, 8, 2), (8, 128, 32, 4, 1, 8, 3), (4, 64, 64, 4, 1, 8, 3)]


def parser():
    options = cli.Parser(__doc__)
    options.add_argument('what', choices=WHAT)
    options.add('cfg', 'config file of the model', metavar='FILE')
    options.add('pretrained', 'weights (default: fresh ones)', metavar='FILE', default='')
    options.add('exported', 'eval: a folder of tools/export.py', metavar='DIR')
    options.add('also', 'eval: other ONNX files to measure; {batch} in a name stands for the batch size', nargs='+', default=[],
                metavar='NAME=FILE')
    options.add('attention', 'the attention operators to measure', nargs='+', choices=('fused', 'composed'),
                default=['fused', 'composed'])
    options.add('batch', 'batch sizes', nargs='+', type=int, default=[1, 16])
    options.add('threads', 'numbers of threads (default: one per core)', nargs='+', type=int)
    options.add('rounds', 'times that each is measured', type=int, default=5)
    options.add('runs', 'runs each time', type=int, default=3)
    options.add('csv', 'file to write the table to as well', metavar='FILE')
    options.add('opts', 'any options of config.py', nargs='+', action='extend', default=[], metavar='KEY VALUE')
    options.add('case', argparse.SUPPRESS, type=int)                        # of a process that measures
    options.add('answer', argparse.SUPPRESS)
    return options


@dataclass
class Case:
    """One engine at one task."""
    name: str
    images: int                                     # per run
    facts: dict                                     # the task: engines at the same are compared
    make: Callable                                  # -> a function to measure; engines should agree on its result, unless None


def main(args):
    if min(args.rounds, args.runs, *args.batch, *(args.threads or [1])) < 1:
        raise ValueError('-rounds, -runs, -batch and -threads must be at least 1')
    cases = [case for threads in args.threads or [cpu.cores()] for case in WHAT[args.what](args, threads)]
    if args.case is not None:
        return measure(cases[args.case], args)
    cli.check_outputs(args.csv)
    if args.pretrained:
        from model import hub
        hub.find(args.pretrained)               # raises where there is none
    machine, rows, tasks = describe(), [], []
    print(machine, flush=True)
    for case in cases:
        if case.facts not in tasks:
            tasks.append(case.facts)
            rows += compare([other for other in cases if other.facts == case.facts], cases, args)
    if args.csv and rows:
        text = io.StringIO()
        table = csv.DictWriter(text, [*rows[0], 'machine'])
        table.writeheader()
        table.writerows({**row, 'machine': machine} for row in rows)
        cli.write_text(args.csv, text.getvalue())
    return 0


def describe():
    """The machine in a line."""
    import paddle
    known = cpu.instructions()
    wide = ' '.join(name for name in ('avx2', 'avx512f', 'avx512_bf16', 'amx_tile') if name in known)
    return (f'{cpu.model_name()}, {cpu.cores()} cores, {wide}, load {os.getloadavg()[0]:.1f}, '
            f'Paddle {paddle.__version__}, Python {platform.python_version()}')


# ---- measuring

def compare(group, cases, args):
    """Measure the cases of a task in turn, in processes of their own. Returns their rows."""
    answers = {case.name: [] for case in group}
    for _ in range(args.rounds):
        for case in random.sample(group, len(group)):
            answers[case.name] += ask(cases.index(case), case.name)
    answers = {name: answer for name, answer in answers.items() if answer}
    first = next(iter(answers.values()), [{}])[0].get('result')
    for name, answer in answers.items():
        far = difference(answer[0]['result'], first) if first else 0
        if not far <= 1e-4:
            print(f'{name}: results differ by {far:.1e} of the largest', flush=True)
    return report(group, answers)


def ask(number, name):
    """[what `measure` says of a case, in a process of its own], or [] with a line that says why not."""
    with tempfile.TemporaryDirectory() as folder:
        answer = os.path.join(folder, 'answer.json')
        done = cli.run_program([sys.executable, *sys.argv, '-case', str(number), '-answer', answer])
        if done.returncode:
            print(f'{name}: left out: {(done.stdout.strip() or "no output").splitlines()[-1]}', flush=True)
            return []
        with open(answer, encoding='utf-8') as file:
            return [json.load(file)]


def measure(case, args):
    """Write {'seconds': of each run, 'mib': growth of the memory, 'result': flat list or None} to args.answer."""
    run = case.make()
    before = resident_mib(reset=True)
    result, seconds = run(), []
    for _ in range(args.runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    mib = resident_mib() - before
    with open(args.answer, 'w', encoding='utf-8') as file:
        json.dump({'seconds': seconds, 'mib': mib, 'result': None if result is None else result.flatten().tolist()}, file)
    return 0


def resident_mib(reset=False):
    """The peak of this process's resident memory, which `reset` lets begin anew. (getrusage's begins with the parent's.)"""
    if reset:
        with open('/proc/self/clear_refs', 'w', encoding='ascii') as file:
            file.write('5')
    with open('/proc/self/status', encoding='ascii') as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith('VmHWM'))


def difference(result, expected):
    """The largest difference, over the largest number expected; not a number where one of them is none."""
    import numpy as np
    return float(np.abs(np.subtract(result, expected)).max() / np.abs(expected).max())


def report(group, answers):
    """Print a line for each engine and return them as dicts: latency in ms, images/s, and this over the first engine's."""
    rows = []
    for case in group:
        if case.name not in answers:
            continue
        values = [value for answer in answers[case.name] for value in answer['seconds']]
        cuts = statistics.quantiles(values, n=100, method='inclusive') if len(values) > 1 else values * 99
        mib = statistics.median(answer['mib'] for answer in answers[case.name])
        first = rows[0]['p50_ms'] if rows else cuts[49] * 1e3
        row = {**case.facts, 'engine': case.name, 'p50_ms': cuts[49] * 1e3, 'p90_ms': cuts[89] * 1e3, 'p99_ms': cuts[98] * 1e3,
               'images_per_s': case.images / cuts[49], 'best_images_per_s': case.images / min(values),
               'ratio': first / (cuts[49] * 1e3), 'mib': mib}
        rows.append(row)
        print(' '.join(f'{key} {value}' for key, value in case.facts.items()) + f'  {case.name:18} p50 {row["p50_ms"]:8.1f} ms  '
              f'p90 {row["p90_ms"]:8.1f}  p99 {row["p99_ms"]:8.1f}  {row["images_per_s"]:7.2f} images/s  x{row["ratio"]:.2f}  '
              f'{mib:6.0f} MiB', flush=True)
    return [{key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


# ---- what is measured

def eval_cases(args, threads):
    """Ours in eager mode first, then the exported files in each runtime."""
    cases, side = [], config_of(args).DATA.IMAGE_SIZE
    exported = os.listdir(args.exported) if args.exported else []
    if args.exported and 'model.json' not in exported and 'model.onnx' not in exported:
        raise ValueError(f'{args.exported}: neither model.json nor model.onnx is there; tools/export.py makes them')
    for batch in args.batch:
        makers = {f'eager {kind}': partial(eager, args, kind, threads) for kind in args.attention}
        if 'model.json' in exported:
            makers['Paddle Inference'] = partial(runtimes.paddle_inference, args.exported, threads)
        files = {'': os.path.join(args.exported, 'model.onnx')} if 'model.onnx' in exported else {}
        for text in args.also:
            name, _, path = text.partition('=')
            if not path:
                raise ValueError(f'-also {text}: expected NAME=FILE')
            files[f'{name} '] = path.replace('{batch}', str(batch))
        for name, path in files.items():
            if not os.path.isfile(path):
                raise ValueError(f'{path}: no such file; tools/export.py makes one')
            makers[f'{name}onnxruntime'] = partial(runtimes.onnxruntime, path, threads)
            makers[f'{name}OpenVINO'] = partial(runtimes.openvino, path, threads)
        cases += [Case(name, batch, {'batch': batch, 'threads': threads}, partial(on_images, make, (batch, 3, side, side)))
                  for name, make in makers.items()]
    return cases


def on_images(make, shape):
    import numpy as np
    engine, images = make(), np.random.default_rng(0).standard_normal(shape, dtype='float32')
    return lambda: engine(images)


def eager(args, kind, threads):
    model = model_of(args, kind, threads).eval()
    import paddle
    return lambda x: paddle.no_grad()(model)(paddle.to_tensor(x)).numpy()


def layer_cases(args, threads):
    """Halo attention with its projections, alone: forward, and forward and backward."""
    cases = []
    for shape in LAYERS:
        name = 'B{} C{} {}x{} N{} stride {} block {} halo {}'.format(*shape[:3], *shape[2:])
        cases += [Case(kind, shape[0], {'layer': name, 'what': what, 'threads': threads},
                       partial(layer, shape, kind, what, threads))
                  for what in ('forward', 'forward+backward') for kind in args.attention]
    return cases


def layer(shape, kind, what, threads):
    paddle = start_paddle(threads)
    from model.attention import HaloAttention
    from model.layers import use_operators
    batch, channels, side, heads, stride, block, halo = shape
    paddle.seed(0)
    attend = use_operators(HaloAttention(channels, channels, heads, block, halo, stride), kind)
    x = paddle.randn([batch, channels, side, side])
    if what == 'forward':
        return lambda: paddle.no_grad()(attend)(x).numpy()
    x.stop_gradient = False

    def both():
        attend(x).sum().backward()
        x.clear_gradient()

    return both


def train_cases(args, threads):
    """A training step: forward, cross-entropy, backward, AdamW."""
    config_of(args)
    return [Case(kind, batch, {'batch': batch, 'threads': threads}, partial(training_step, args, kind, batch, threads))
            for batch in args.batch for kind in args.attention]


def training_step(args, kind, batch, threads):
    model, config = model_of(args, kind, threads), config_of(args)
    import paddle
    model.train()
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=model.parameters(), weight_decay=0.05)
    if config.TRAIN.TO_STATIC:
        from model.layers import Traced
        model = Traced(model)
    x = paddle.randn([batch, 3, config.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE])
    labels = paddle.randint(0, config.MODEL.NUM_CLASSES, [batch])

    def step():
        loss = paddle.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        loss.item()

    return step


def start_paddle(threads):
    import utils

    import paddle
    utils.start('cpu')
    paddle_internals.set_num_threads(threads)
    return paddle


def config_of(args, *opts):
    from config import get_config
    if not args.cfg:
        raise ValueError(f'{args.what} needs -cfg FILE')
    return get_config(args.cfg, [*args.opts, *opts])


def model_of(args, attention, threads):
    """The model of the config with this attention operator."""
    paddle = start_paddle(threads)
    from halonet import build_halonet
    from model import weights
    paddle.seed(0)                                  # fresh weights are the same for all
    model = build_halonet(config_of(args, 'MODEL.ATTENTION', attention))
    if args.pretrained:
        weights.load_pretrained(model, args.pretrained)
    return model


WHAT = {'eval': eval_cases, 'layer': layer_cases, 'train': train_cases}

if __name__ == '__main__':
    parser().run(main)
