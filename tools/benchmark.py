"""Measure speed: of evaluation in each runtime, of the attention layer, of a training step.

  python tools/benchmark.py eval -cfg configs/halonet_26t_256.yaml -pretrained W.pdparams -exported exported -batch 1 16
  python tools/benchmark.py eval ... -also timm=halonet26t.{batch}.onnx -csv eval.csv
  python tools/benchmark.py layer -csv layer.csv
  python tools/benchmark.py train -cfg configs/halonet_26t_256.yaml -batch 16

What is compared is measured in turn, in random order, -rounds times: each time once to warm up, then -runs times. Quote the
medians and the ratios; figures of different calls on a shared machine do not compare. `eval` takes the fused and composed
eager model, the files of tools/export.py in DIR, and with -also the ONNX files of others; a runtime that is not installed, or
logits that differ by more than 1e-4 from the first engine's, are said. OpenVINO computes in float32.
"""
import csv
import os
import platform
import random
import resource
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli, runtimes  # noqa: E402

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
    return options


def main(args):
    import utils  # isort: skip  (first: it prepares for Paddle's import)
    utils.start('cpu')
    machine = describe()
    print(machine, flush=True)
    rows = []
    for threads in args.threads or [len(os.sched_getaffinity(0))]:
        rows += WHAT[args.what](args, threads)
    if args.csv:
        with open(args.csv, 'w', encoding='utf-8', newline='') as file:
            table = csv.DictWriter(file, [*rows[0], 'machine'])
            table.writeheader()
            table.writerows({**row, 'machine': machine} for row in rows)
    return 0


def describe():
    """The machine in a line."""
    import paddle
    with open('/proc/cpuinfo', encoding='utf-8') as file:
        text = file.read()
    model = next((line.split(':')[1].strip() for line in text.splitlines() if line.startswith('model name')), platform.machine())
    widths = [name for name in ('avx2', 'avx512f', 'avx512_bf16', 'amx_tile') if f' {name} ' in text.replace('\n', ' ')]
    return (f'{model}, {len(os.sched_getaffinity(0))} cores, {" ".join(widths)}, load {os.getloadavg()[0]:.1f}, Paddle '
            f'{paddle.__version__}, Python {platform.python_version()}')


# ---- measuring

def in_turn(engines, rounds, runs):
    """Seconds of each run of each engine, {name: function} -> {name: list}: in a new random order each round."""
    seconds = {name: [] for name in engines}
    for _ in range(rounds):
        for name in random.sample(list(engines), len(engines)):
            engines[name]()                                                 # another engine's threads come to rest, caches fill
            for _ in range(runs):
                start = time.perf_counter()
                engines[name]()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds, images, **facts):
    """Print a line for each engine and return them as dicts: latency in ms, images/s, and this over the first engine's."""
    rows, first = [], statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        cuts = statistics.quantiles(values, n=100, method='inclusive')
        row = {**facts, 'engine': name, 'p50_ms': cuts[49] * 1e3, 'p90_ms': cuts[89] * 1e3, 'p99_ms': cuts[98] * 1e3,
               'images_per_s': images / cuts[49], 'best_images_per_s': images / min(values), 'ratio': first / cuts[49]}
        rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
        print(' '.join(f'{key} {value}' for key, value in facts.items()) + f'  {name:24} p50 {row["p50_ms"]:8.1f} ms  p90 '
              f'{row["p90_ms"]:8.1f}  p99 {row["p99_ms"]:8.1f}  {row["images_per_s"]:7.2f} images/s  '
              f'x{row["ratio"]:.2f}', flush=True)
    return rows


# ---- what is measured

def measure_eval(args, threads):
    rows = []
    for batch in args.batch:
        import numpy as np
        engines, expected = {}, None
        x = np.random.default_rng(0).standard_normal((batch, 3, *[config_of(args).DATA.IMAGE_SIZE] * 2), dtype='float32')
        for name, make in eval_engines(args, batch, threads):
            try:
                engine = make()
            except (ValueError, RuntimeError) as error:
                print(f'{name}: left out: {error}', flush=True)
                continue
            y = engine(x)
            expected = y if expected is None else expected
            if not abs(y - expected).max() <= 1e-4 * abs(expected).max():
                print(f'{name}: logits differ by {abs(y - expected).max() / abs(expected).max():.1e} of the largest', flush=True)
            engines[name] = lambda engine=engine, x=x: engine(x)
        rows += report(in_turn(engines, args.rounds, args.runs), batch, batch=batch, threads=threads)
    return rows


def eval_engines(args, batch, threads):
    """(name, function that makes it) of each engine, ours in eager mode first."""
    def eager(kind):
        import paddle
        model = model_of(args, kind, threads).eval()
        return lambda x: paddle.no_grad()(model)(paddle.to_tensor(x)).numpy()

    made = [(f'eager {kind}', lambda kind=kind: eager(kind)) for kind in args.attention]
    if args.exported and os.path.exists(os.path.join(args.exported, 'model.json')):
        made.append(('Paddle Inference', lambda: runtimes.paddle_inference(args.exported, threads)))
    files = [('', os.path.join(args.exported, 'model.onnx'))] if args.exported else []
    for text in args.also:
        name, _, path = text.partition('=')
        files.append((f'{name} ', path.replace('{batch}', str(batch))))
    for name, path in files:
        if not os.path.isfile(path):
            raise ValueError(f'{path}: no such file; tools/export.py makes one')
        made += [(f'{name}onnxruntime', lambda path=path: runtimes.onnxruntime(path, threads)),
                 (f'{name}OpenVINO', lambda path=path: runtimes.openvino(path, threads))]
    return made


def measure_layer(args, threads):
    """Halo attention with its projections, alone: forward, and forward and backward."""
    import paddle

    from attention import HaloAttention
    from layers import use_operators
    rows = []
    paddle.base.core.set_num_threads(threads)
    for batch, channels, side, heads, stride, block, halo in LAYERS:
        x = paddle.randn([batch, channels, side, side])
        x.stop_gradient = False
        forward, both = {}, {}
        for kind in args.attention:
            layer = use_operators(HaloAttention(channels, channels, heads, block, halo, stride), kind)
            forward[kind] = lambda layer=layer, x=x: paddle.no_grad()(layer)(x)
            both[kind] = lambda layer=layer, x=x: layer(x).sum().backward()
        shape = f'B{batch} C{channels} {side}x{side} N{heads} stride {stride} block {block} halo {halo}'
        for what, engines in (('forward', forward), ('forward+backward', both)):
            rows += report(in_turn(engines, args.rounds, args.runs), batch, layer=shape, what=what, threads=threads)
    return rows


def measure_train(args, threads):
    """A training step: forward, cross-entropy, backward, AdamW. The peak is the resident memory of the process so far."""
    import paddle
    rows = []
    for batch in args.batch:
        steps = {kind: training_step(model_of(args, kind, threads), batch, config_of(args)) for kind in args.attention}
        rows += report(in_turn(steps, args.rounds, args.runs), batch, batch=batch, threads=threads)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f'batch {batch}: peak resident memory {peak:.0f} MiB (of {", ".join(steps)} in one process)', flush=True)
        for row in rows[-len(steps):]:
            row['peak_mib'] = round(peak)
        paddle.device.synchronize()
    return rows


def training_step(model, batch, config):
    import paddle
    model.train()
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=model.parameters(), weight_decay=0.05)
    if config.TRAIN.TO_STATIC:
        from builders import Traced
        model = Traced(model)
    x = paddle.randn([batch, 3, config.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE])
    labels = paddle.randint(0, config.MODEL.NUM_CLASSES, [batch])

    def step():
        loss = paddle.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        return loss.item()

    return step


def config_of(args, *opts):
    from config import get_config
    if not args.cfg:
        raise ValueError(f'{args.what} needs -cfg FILE')
    return get_config(args.cfg, [*args.opts, *opts])


def model_of(args, attention, threads):
    """The model of the config with this attention operator."""
    import paddle

    import weights
    from halonet import build_halonet
    paddle.base.core.set_num_threads(threads)
    paddle.seed(0)                                  # fresh weights are the same for all
    model = build_halonet(config_of(args, 'MODEL.ATTENTION', attention))
    if args.pretrained:
        weights.load_pretrained(model, args.pretrained)
    return model


WHAT = {'eval': measure_eval, 'layer': measure_layer, 'train': measure_train}

if __name__ == '__main__':
    parser().run(main)
