"""Write a model for inference runtimes, Paddle Inference and ONNX, and compare each file with the model.

  python tools/export.py -cfg configs/halonet_26t_256.yaml -pretrained W.pdparams -output exported
  python tools/export.py -cfg configs/halonet_26t_256.yaml -pretrained W.pdparams -output exported -dynamic

Batch norms are folded, and the batch size is free. DIR gets model.json and model.pdiparams (Paddle),
model.onnx, meta.json with the class names (null if they are not known), preprocess.json with the preparation
of images, a card README.md, and infer.py, which classifies pictures by onnxruntime without Paddle. The
logits of each file are compared with the model's for 1, 3 and 8 images. If they differ by more than 1e-4 of
the largest, nothing is written. All is computed on the CPU. ONNX needs requirements-export.txt.
Exit status: 0, 1 if the check fails, or 2 for a mistake in the command.
"""
import argparse
import os
import sys
import tempfile
from typing import Any, Callable, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system import sizes
from system.console import quiet
from tools import cli, export_files, precision, runtimes

LIMIT = 1e-4                                        # of the largest logit
BATCHES = (1, 3, 8)
OPSETS = range(13, 22)                              # paddle2onnx 2.1.0 ends the process for higher ones
NEEDED = ('paddle2onnx', 'polygraphy', 'onnx_graphsurgeon', 'sympy', 'onnx', 'onnxruntime')


def open_onnx(folder: str) -> runtimes.Runtime:
    """Open folder/model.onnx in ONNX Runtime."""
    return runtimes.onnxruntime(os.path.join(folder, 'model.onnx'))


FORMATS = {'paddle': runtimes.paddle_inference, 'onnx': open_onnx}


def parser() -> cli.Parser:
    options = cli.Parser(__doc__)
    options.add_model()
    options.add('output', 'the folder to make', metavar='DIR', required=True)
    options.add('size', 'the same as -image_size', dest='image_size', metavar='N')
    options.add('dynamic', 'allow images of any size: slower in ONNX, and for conv and halo blocks only',
                action='store_true')
    options.add('input', 'what it takes: float32 (B, C, H, W), normalised, or pixels, uint8 (B, H, W, C)',
                choices=('float32', 'uint8'), default='float32')
    options.add('result', 'what it gives', choices=export_files.RESULTS, default='logits')
    options.add('topk', 'classes of -result topk', type=int, default=5, metavar='N')
    options.add('format', 'what to write (default: all that the precision allows)', nargs='+',
                choices=FORMATS)
    options.add('precision', 'of model.onnx; float16 and int8 write no files for Paddle Inference',
                choices=precision.PRECISIONS, default='float32')
    options.add('calibrate', 'data folder with the lists, for -precision int8: random images of '
                'train_list.txt give the ranges, and DATA.EVAL_LIST the accuracy', metavar='DATA')
    options.add('drop', 'points of top-1 accuracy that int8 may lose; layers stay float32 until it holds '
                f'(default: {precision.DROP})', type=float, metavar='X')
    options.add('opset', f'of ONNX, {OPSETS[0]} to {OPSETS[-1]}', type=int, default=17)
    return options


def main(args: argparse.Namespace) -> int:
    args.opts = [*args.opts, 'MODEL.ATTENTION', 'composed']     # runtimes have no operators of ours
    args.device = 'cpu'                             # a GPU may compute in TF32, beyond LIMIT
    args.format = args.format or (list(FORMATS) if args.precision == 'float32' else ['onnx'])
    if args.calibrate:
        args.opts += ['DATA.DATA_PATH', args.calibrate]
    config = cli.config_of(args)
    check_arguments(args, config)
    names = cli.find_class_names(config, args.classes)
    if names is None and config.MODEL.NUM_CLASSES:
        print('no class names are known: "classes" in meta.json will be null (-classes FILE gives names)',
              file=sys.stderr)
    parent = os.path.dirname(os.path.abspath(args.output))
    os.makedirs(parent, exist_ok=True)
    model, _ = cli.load_model(config)
    facts = export_files.card_facts(config, model)  # before its batch norms are folded
    with tempfile.TemporaryDirectory(dir=parent, prefix='.export-') as folder:
        differences = write_and_compare(model, config, args, folder)
        for name, value in differences.items():
            print(f'{name}: differs from the model by {value:.1e} of the largest result')
        if not all(value <= LIMIT for value in differences.values()):       # NaN fails too
            print(f'error: the limit is {LIMIT:.0e}; nothing written', file=sys.stderr)
            return 1
        meta = metadata(config, args, names, differences)
        if args.precision != 'float32':
            lowered = lower_precision(config, args, folder)
            meta.update(lowered)
            facts['precision'] = export_files.precision_fact(lowered)
        cli.write_json(os.path.join(folder, 'meta.json'), meta)
        export_files.write(folder, export_files.preprocess(config, args), config, facts)
        cli.move_content(folder, args.output)
    print(f'{args.output}: ' + ', '.join(sorted(os.listdir(args.output))))
    return 0


def check_arguments(args: argparse.Namespace, config: Any) -> None:
    """Raise ValueError for arguments that cannot work, before the model is built."""
    kinds = {kind for stage in config.MODEL.STAGES for kind in ('bot', 'lambda') if kind in stage}
    if args.dynamic and kinds:
        raise ValueError('-dynamic: bot and lambda blocks are built for one size; give it by -size')
    cli.check_new_folder(args.output)
    if args.result != 'logits' and not config.MODEL.NUM_CLASSES:
        raise ValueError(f'-result {args.result}: a model without a classifier has no probabilities')
    if not 1 <= args.topk <= max(config.MODEL.NUM_CLASSES, 1) and args.result == 'topk':
        raise ValueError(f'-topk {args.topk}: it must be from 1 to {config.MODEL.NUM_CLASSES}, the classes')
    if args.opset not in OPSETS:
        raise ValueError(f'-opset {args.opset}: it must be from {OPSETS[0]} to {OPSETS[-1]}')
    if args.precision != 'float32' and args.format != ['onnx']:
        raise ValueError(f'-precision {args.precision} is for -format onnx only')
    precision.check(args, config)
    if 'onnx' in args.format:
        with quiet():
            for name in NEEDED:
                runtimes.need(name)


def write_and_compare(model: Any, config: Any, args: argparse.Namespace, folder: str) -> dict[str, float]:
    """Write the files of args.format into `folder`. Returns the `difference` of each format."""
    from tools.deployed import FromPixels, Probabilities
    shape = config.DATA.CHANNELS, *sizes.sides(config.DATA.IMAGE_SIZE)
    if args.input == 'uint8':
        model = FromPixels(model, config.DATA.MEAN, config.DATA.STD)
    complete = model if args.result == 'logits' else Probabilities(model)
    complete.eval()
    expected = [(x, run(complete, x)) for x in images(shape, args)]
    if args.result == 'topk':
        complete = Probabilities(model, args.topk)
    with quiet():
        write(complete, shape, args, folder)
        return {name: difference(FORMATS[name](folder), expected) for name in args.format}


def lower_precision(config: Any, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Replace model.onnx in `folder` by one of args.precision. Returns what is to say of it."""
    shape = config.DATA.CHANNELS, *sizes.sides(config.DATA.IMAGE_SIZE)
    with tempfile.TemporaryDirectory() as temporary:
        return precision.lower(os.path.join(folder, 'model.onnx'), temporary, config, args,
                               draw(precision.BATCH, shape, args))


# ---- comparing

def images(shape: tuple[int, int, int], args: argparse.Namespace) -> list:
    """Draw images of each batch size to compare on; with -dynamic of other sides as well.

    `shape` is (channels, height, width).
    """
    shapes = [shape] * len(BATCHES)
    if args.dynamic:
        channels, height, width = shape
        smaller = height - min(13, height // 2)
        shapes = [shape, (channels, height + 32, width), (channels, smaller, width + 5)]
    return [draw(batch, other, args) for batch, other in zip(BATCHES, shapes)]


def draw(batch: int, shape: tuple[int, int, int], args: argparse.Namespace) -> Any:
    """Draw a batch of random images of one shape, as args.input says."""
    import numpy as np
    random = np.random.default_rng(batch)
    channels, height, width = shape
    if args.input == 'uint8':
        return random.integers(0, 256, (batch, height, width, channels), np.uint8)
    return random.standard_normal((batch, channels, height, width), dtype='float32')


def run(model: Callable, x: Any) -> Any:
    """Return what a model gives for images, as an array."""
    import paddle
    with paddle.no_grad():
        return model(paddle.to_tensor(x)).numpy()


def difference(runtime: runtimes.Runtime, expected: list) -> float:
    """Return the largest difference from the expected results over the largest of these, or NaN.

    expected: pairs (images, results), which are all probabilities where the runtime gives the top ones.
    """
    import numpy as np
    return float(np.max([np.abs(error_of(runtime(x), y)).max() / np.abs(y).max() for x, y in expected]))


def error_of(found: Any, expected: Any) -> Any:
    """Return the differences of results (B, K), or of the top ones and their labels, from the expected."""
    import numpy as np
    if not isinstance(found, tuple):
        return found - expected
    values, labels = found
    best = np.sort(expected, axis=1)[:, ::-1][:, :values.shape[1]]
    return np.stack([values - best, values - np.take_along_axis(expected, labels, axis=1)])


# ---- writing

def write(model: Any, shape: tuple[int, int, int], args: argparse.Namespace, folder: str) -> None:
    """Write the files of args.format into `folder`. The batch norms of `model` are folded in place."""
    from tools.deployed import deployed, look_windows_up
    deployed(model)
    channels, sides = shape[0], shape[1:]
    free: tuple[Optional[int], ...] = (None, None) if args.dynamic else sides
    traced = (*free, channels) if args.input == 'uint8' else (channels, *free)
    if 'paddle' in args.format:
        save(model, traced, os.path.join(folder, 'model'), args.input)
    if 'onnx' in args.format:
        if not args.dynamic:
            look_windows_up(model)                  # only for ONNX: Paddle Inference 3.3.1 crashes on these
        with tempfile.TemporaryDirectory() as temporary:
            program = os.path.join(temporary, 'model')
            save(model, traced, program, args.input)
            to_onnx(program, os.path.join(folder, 'model.onnx'), args.opset)


def save(model: Any, shape: tuple[Optional[int], ...], path: str, dtype: str = 'float32') -> None:
    """Save a model as Paddle's static program, path.json and path.pdiparams.

    `shape` is that of an image; None is free.
    """
    import paddle
    # a GPU build has another operator for F.linear, at which Paddle2ONNX 2.1 ends the process
    paddle.set_flags({'FLAGS_use_legacy_linear': True})
    spec = paddle.static.InputSpec([None, *shape], dtype, 'images')
    program = paddle.jit.to_static(model.forward, input_spec=[spec], full_graph=True, backend=None)
    paddle.jit.save(program, path)


def to_onnx(path: str, target: str, opset: int) -> None:
    """Convert a saved static program into an ONNX file, and fold its constants."""
    import onnx
    import paddle2onnx
    import polygraphy.config
    from polygraphy.backend.onnx import fold_constants
    polygraphy.config.AUTOINSTALL_DEPS = False
    # paddle2onnx could fold as well, but lets polygraphy install packages and hides a failure
    paddle2onnx.export(f'{path}.json', f'{path}.pdiparams', target, opset_version=opset, optimize_tool='None')
    model = fold_constants(onnx.load(target), error_ok=False)
    set_padding_to_zero(model.graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)


def set_padding_to_zero(graph: Any) -> None:
    """Let every Pad of an ONNX graph pad with zero: paddle2onnx 2.1.0 writes uninitialised memory there."""
    import numpy as np
    import onnx
    zero = onnx.numpy_helper.from_array(np.zeros([], 'float32'), 'pad.zero')
    graph.initializer.append(zero)
    for node in graph.node:
        if node.op_type == 'Pad':
            node.input[2:3] = [zero.name]
    used = {name for node in graph.node for name in node.input}
    kept = [value for value in graph.initializer if value.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def metadata(config: Any, args: argparse.Namespace, names: Optional[list[str]],
             differences: dict[str, float]) -> dict:
    """Return the content of meta.json: how to prepare images, and what was checked."""
    data = config.DATA
    kind = export_files.KINDS.get(data.CHANNELS, 'channels of the file')
    described = f'images: float32 (batch, {data.CHANNELS}, height, width), {kind}, (value / 255 - mean) / std'
    if args.input == 'uint8':
        described = f'images: uint8 (batch, height, width, {data.CHANNELS}), {kind}'
    return {
        'model': config.MODEL.NAME,
        'input': described,
        'result': args.result,
        'size': data.IMAGE_SIZE,                    # or [height, width]
        'dynamic_size': args.dynamic,
        'crop_pct': data.CROP_PCT,
        'interpolation': 'bicubic',
        'background': data.BACKGROUND,              # of transparent pixels
        'resize': 'the smallest that covers size / crop_pct, in the same proportions; then the centre',
        'mean': list(data.MEAN),
        'std': list(data.STD),
        'difference_from_model': differences,
        'classes': names,
    }


if __name__ == '__main__':
    parser().run(main)
