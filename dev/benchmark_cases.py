"""The engines and tasks that dev/benchmark.py measures.

Each is made in the process that measures it, so Paddle is imported there.
"""
import argparse
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Callable

from system import paddle_internals, sizes
from tools import runtimes

PRECISIONS = ('float32', 'tf32', 'float16', 'bfloat16')


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a halo attention layer and of its input (batch, channels, side, side)."""
    batch: int
    channels: int
    side: int
    heads: int
    stride: int
    block: int
    halo: int

    def __str__(self) -> str:
        return (f'B{self.batch} C{self.channels} {self.side}x{self.side} N{self.heads} stride {self.stride} '
                f'block {self.block} halo {self.halo}')


LAYERS = (                                          # of the networks of 26 layers, and two at high resolution
    LayerShape(16, 256, 16, 8, 1, 8, 2),
    LayerShape(16, 512, 16, 8, 2, 8, 2),
    LayerShape(8, 128, 32, 4, 1, 8, 3),
    LayerShape(4, 64, 64, 4, 1, 8, 3),
)


@dataclass
class Case:
    """One engine at one task."""
    name: str
    images: int                                     # per run
    facts: dict                                     # the task; engines at the same task are compared
    make: Callable                                  # -> a function that returns its result or None


def eval_cases(args: argparse.Namespace, threads: int) -> list[Case]:
    """Return the eager model first, then the exported files in each runtime."""
    data = config_of(args).DATA
    shape = data.CHANNELS, *sizes.sides(data.IMAGE_SIZE)
    exported = os.listdir(args.exported) if args.exported else []
    if args.exported and 'model.json' not in exported and 'model.onnx' not in exported:
        raise ValueError(f'{args.exported}: neither model.json nor model.onnx is there; '
                         'tools/export.py makes them')
    cases = []
    for batch in args.batch:
        makers: dict[str, Callable] = {}
        for kind, precision in engines(args):
            makers[f'eager {kind}{suffix(precision)}'] = partial(eager, args, kind, precision, threads)
        if 'model.json' in exported:
            makers['Paddle Inference'] = partial(runtimes.paddle_inference, args.exported, threads)
        for name, path in onnx_files(args, exported, batch).items():
            makers[f'{name}onnxruntime'] = partial(runtimes.onnxruntime, path, threads)
            makers[f'{name}OpenVINO'] = partial(runtimes.openvino, path, threads)
        for name, make in makers.items():
            on_batch = partial(on_images, make, (batch, *shape))
            cases.append(Case(name, batch, {'batch': batch, 'threads': threads}, on_batch))
    return cases


def onnx_files(args: argparse.Namespace, exported: list[str], batch: int) -> dict[str, str]:
    """Return {prefix of the engine's name: ONNX file}: the exported one and those of -also."""
    found = {}
    if 'model.onnx' in exported:
        found[''] = os.path.join(args.exported, 'model.onnx')
    for text in args.also:
        name, _, path = text.partition('=')
        if not path:
            raise ValueError(f'-also {text}: expected NAME=FILE')
        found[f'{name} '] = path.replace('{batch}', str(batch))
    for path in found.values():
        if not os.path.isfile(path):
            raise ValueError(f'{path}: no such file; tools/export.py makes one')
    return found


def on_images(make: Callable, shape: tuple) -> Callable:
    """Make an engine, and return its run on fixed random images."""
    import numpy as np
    engine = make()
    images = np.random.default_rng(0).standard_normal(shape, dtype='float32')
    return lambda: engine(images)


def engines(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return each pair of an attention and a precision to measure. Raises ValueError if it needs a GPU."""
    if args.device == 'cpu' and set(args.precision) - {'float32'}:
        raise ValueError('-precision: a CPU computes in float32 only; give -device gpu')
    return [(kind, precision) for kind in args.attention for precision in args.precision]


def suffix(precision: str) -> str:
    """Return what the name of an engine has for a precision other than float32."""
    return '' if precision == 'float32' else f' {precision}'


def eager(args: argparse.Namespace, kind: str, precision: str, threads: int) -> runtimes.Runtime:
    """Return the eager model as a function from images to logits."""
    model = model_of(args, kind, threads, precision).eval()
    import paddle

    def run(images: Any) -> Any:
        with paddle.no_grad(), autocast(precision):
            logits = model(paddle.to_tensor(images))
        return logits.astype('float32').numpy()

    return run


def layer_cases(args: argparse.Namespace, threads: int) -> list[Case]:
    """Return halo attention with its projections: forward, and forward and backward."""
    cases = []
    for shape in LAYERS:
        for what in ('forward', 'forward+backward'):
            for kind in args.attention:
                facts = {'layer': str(shape), 'what': what, 'threads': threads}
                make = partial(layer, args.device, shape, kind, what, threads)
                cases.append(Case(kind, shape.batch, facts, make))
    return cases


def layer(device: str, shape: LayerShape, kind: str, what: str, threads: int) -> Callable:
    """Make a halo attention layer, and return its run on fixed random input."""
    paddle = start_paddle(device, threads)
    from model.attention import HaloAttention
    from model.layers import use_operators
    paddle.seed(0)
    attention = HaloAttention(
        shape.channels, shape.channels, shape.heads, shape.block, shape.halo, shape.stride)
    use_operators(attention, kind)
    x = paddle.randn([shape.batch, shape.channels, shape.side, shape.side])

    def forward() -> Any:
        with paddle.no_grad():
            return attention(x).numpy()

    def forward_and_backward() -> None:
        attention(x).sum().backward()
        x.clear_gradient()
        if device == 'gpu':
            paddle.device.synchronize()

    if what == 'forward':
        return forward
    x.stop_gradient = False
    return forward_and_backward


def train_cases(args: argparse.Namespace, threads: int) -> list[Case]:
    """Return a training step: forward, cross-entropy, backward, AdamW."""
    config_of(args)                                 # raises for a mistake
    cases = []
    for batch in args.batch:
        for kind, precision in engines(args):
            step = partial(training_step, args, kind, precision, batch, threads)
            facts = {'batch': batch, 'threads': threads}
            cases.append(Case(f'{kind}{suffix(precision)}', batch, facts, step))
    return cases


def training_step(args: argparse.Namespace, kind: str, precision: str, batch: int, threads: int) -> Callable:
    """Make a model and its optimizer, and return a step on fixed random images."""
    model, config = model_of(args, kind, threads, precision), config_of(args)
    import paddle

    from training.mixed_precision import LossScaler
    scaler = LossScaler(enable=precision == 'float16')
    model.train()
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=model.parameters(), weight_decay=0.05)
    if config.TRAIN.TO_STATIC:
        from model.layers import Traced
        model = Traced(model)
    x = paddle.randn([batch, config.DATA.CHANNELS, *sizes.sides(config.DATA.IMAGE_SIZE)])
    labels = paddle.randint(0, config.MODEL.NUM_CLASSES, [batch])

    def step() -> None:
        with autocast(precision):
            logits = model(x)
        loss = paddle.nn.functional.cross_entropy(logits.astype('float32'), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.clear_grad(set_to_zero=False)
        loss.item()                                 # waits for the device

    return step


def autocast(precision: str) -> AbstractContextManager:
    """Return the context of a forward pass in a precision of PRECISIONS."""
    from training.mixed_precision import make_autocast
    return make_autocast(precision if precision in ('float16', 'bfloat16') else '')()


def start_paddle(device: str, threads: int, precision: str = 'float32') -> ModuleType:
    """Import Paddle for a device, and let it compute with so many threads of the CPU."""
    # cuBLAS and cuDNN read it once: from compute capability 8.0 on they take TF32 where nothing forbids it
    os.environ['NVIDIA_TF32_OVERRIDE'] = '0' if precision == 'float32' else '1'
    import utils

    import paddle
    utils.start(device)
    paddle_internals.set_num_threads(threads)
    return paddle


def config_of(args: argparse.Namespace, *opts: Any) -> Any:
    """Return the config of -cfg and -opts. Raises ValueError without -cfg."""
    from config import get_config
    if not args.cfg:
        raise ValueError(f'{args.what} needs -cfg FILE')
    return get_config(args.cfg, [*args.opts, *opts])


def model_of(args: argparse.Namespace, attention: str, threads: int, precision: str) -> Any:
    """Build the model of the config with this attention operator."""
    paddle = start_paddle(args.device, threads, precision)
    from halonet import build_halonet
    from model import weights
    paddle.seed(0)                                  # the same fresh weights for every engine
    model = build_halonet(config_of(args, 'MODEL.ATTENTION', attention))
    if args.pretrained:
        weights.load_pretrained(model, args.pretrained)
    return model


WHAT = {'eval': eval_cases, 'layer': layer_cases, 'train': train_cases}
