"""Write a model for inference runtimes: Paddle Inference and ONNX, checked against the model itself.

  python tools/export.py -cfg configs/halonet_26t_256.yaml -pretrained halonet_26t_256.pdparams -output exported
  python tools/export.py -cfg configs/halonet_26t_256.yaml -pretrained halonet_26t_256.pdparams -output exported -dynamic

Batch norms are folded, and any batch size may be given. DIR gets model.json and model.pdiparams (Paddle), model.onnx and
meta.json: how images are prepared, and the class names (null if they are not known). The logits of each file are compared with
the model's for 1, 3 and 8 images; where they differ by more than 1e-4 of the largest, nothing is written. ONNX needs
requirements-export.txt.
Exit status: 0, 1 if the check fails, or 2 for a mistake in the command.
"""
import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli, runtimes

LIMIT = 1e-4
BATCHES = (1, 3, 8)
OPSETS = range(13, 22)                              # paddle2onnx 2.1.0 ends the process for higher ones
NEEDED = ('paddle2onnx', 'polygraphy', 'onnx_graphsurgeon', 'sympy', 'onnx', 'onnxruntime')
FORMATS = {'paddle': runtimes.paddle_inference, 'onnx': lambda folder: runtimes.onnxruntime(os.path.join(folder, 'model.onnx'))}


def parser():
    options = cli.Parser(__doc__)
    options.add_model()
    options.add('output', 'the folder to make', metavar='DIR', required=True)
    options.add('size', 'the same as -image_size', dest='image_size', metavar='N')
    options.add('dynamic', 'let images have any size too; slower in ONNX, and for networks of conv and halo blocks only',
                action='store_true')
    options.add('format', 'what to write', nargs='+', choices=FORMATS, default=list(FORMATS))
    options.add('opset', f'of ONNX, {OPSETS[0]} to {OPSETS[-1]}', type=int, default=17)
    return options


def main(args):
    args.opts = [*args.opts, 'MODEL.ATTENTION', 'composed']                 # runtimes know no operators of ours
    config = cli.config_of(args)
    if args.dynamic and any(kind in stage for stage in config.MODEL.STAGES for kind in ('bot', 'lambda')):
        raise ValueError('-dynamic: bot and lambda blocks are built for one size; give it by -size')
    if os.path.exists(args.output) and (not os.path.isdir(args.output) or os.listdir(args.output)):
        raise ValueError(f'-output {args.output} exists and is not an empty folder; choose another')
    if args.opset not in OPSETS:
        raise ValueError(f'-opset {args.opset}: it must be from {OPSETS[0]} to {OPSETS[-1]}')
    if 'onnx' in args.format:
        with quiet():
            for name in NEEDED:
                runtimes.need(name)
    names = cli.find_class_names(config, args.classes)
    if names is None and config.MODEL.NUM_CLASSES:
        print('no class names are known: "classes" in meta.json will be null (-classes FILE gives names)', file=sys.stderr)
    parent = os.path.dirname(os.path.abspath(args.output))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix='.export-') as folder:
        model, _ = cli.load_model(config)
        expected = [(x, run(model, x)) for x in images(config.DATA.IMAGE_SIZE, args.dynamic)]
        with quiet():
            write(model, config.DATA.IMAGE_SIZE, args, folder)
            differences = {name: difference(FORMATS[name](folder), expected) for name in args.format}
        for name, value in differences.items():
            print(f'{name}: differs from the model by {value:.1e} of the largest logit')
        if not all(value <= LIMIT for value in differences.values()):       # not a number fails too
            print(f'error: the limit is {LIMIT:.0e}; nothing written', file=sys.stderr)
            return 1
        cli.write_text(os.path.join(folder, 'meta.json'), json.dumps(metadata(config, args, names, differences), indent=1) + '\n')
        ready = os.path.join(folder, 'ready')
        os.mkdir(ready)
        for name in os.listdir(folder):
            if name != 'ready':
                shutil.move(os.path.join(folder, name), ready)
        os.replace(ready, args.output)
    print(f'{args.output}: ' + ', '.join(sorted(os.listdir(args.output))))
    return 0


@contextmanager
def quiet():
    """Hold back what libraries print within, from C++ too. An exception other than ValueError shows it."""
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.flush()
    saved = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as held:
        try:
            for number in (1, 2):
                os.dup2(held.fileno(), number)
            yield
        except ValueError:
            raise
        except BaseException:
            held.seek(0)
            os.write(saved[1], held.read())
            raise
        finally:
            for stream in streams:
                stream.flush()
            for number, copy in zip((1, 2), saved):
                os.dup2(copy, number)
                os.close(copy)


def images(size, dynamic):
    """Standard normal images to compare on: of each batch size, and with `dynamic` of other sides as well."""
    import numpy as np
    random = np.random.default_rng(0)
    sides = [(size, size), (size + 32, size), (size - min(13, size // 2), size + 5)] if dynamic else [(size, size)] * len(BATCHES)
    return [random.standard_normal((batch, 3, *side), dtype='float32') for batch, side in zip(BATCHES, sides)]


def run(model, x):
    import paddle
    with paddle.no_grad():
        return model(paddle.to_tensor(x)).numpy()


def difference(runtime, expected):
    """The largest difference from the expected logits, over the largest of these; not a number where one of them is none."""
    import numpy as np
    return float(np.max([np.abs(runtime(x) - y).max() / np.abs(y).max() for x, y in expected]))


def write(model, size, args, folder):
    """Put the files of args.format into the folder; the model is folded by it."""
    from tools.deployed import deployed, look_windows_up
    deployed(model)
    side = None if args.dynamic else size
    if 'paddle' in args.format:
        save(model, side, os.path.join(folder, 'model'))
    if 'onnx' in args.format:
        if not args.dynamic:
            look_windows_up(model)                                          # Paddle Inference 3.3.1 crashes on these lookups
        with tempfile.TemporaryDirectory() as temporary:
            save(model, side, os.path.join(temporary, 'model'))
            to_onnx(os.path.join(temporary, 'model'), os.path.join(folder, 'model.onnx'), args.opset)


def save(model, side, path):
    import paddle
    spec = paddle.static.InputSpec([None, 3, side, side], 'float32', 'images')
    paddle.jit.save(paddle.jit.to_static(model.forward, input_spec=[spec], full_graph=True), path)


def to_onnx(path, target, opset):
    """A saved program -> an ONNX file with constants folded.

    Its padding is made zero: paddle2onnx 2.1.0 writes memory that it never set there.
    """
    import numpy as np
    import onnx
    import paddle2onnx
    import polygraphy.config
    from polygraphy.backend.onnx import fold_constants
    polygraphy.config.AUTOINSTALL_DEPS = False
    # folded here: paddle2onnx would let polygraphy install packages, and not fold if that fails
    paddle2onnx.export(f'{path}.json', f'{path}.pdiparams', target, opset_version=opset, optimize_tool='None')
    model = fold_constants(onnx.load(target), error_ok=False)
    zero = onnx.numpy_helper.from_array(np.zeros([], 'float32'), 'pad.zero')
    model.graph.initializer.append(zero)
    for node in model.graph.node:
        if node.op_type == 'Pad':
            node.input[2:3] = [zero.name]
    used = {name for node in model.graph.node for name in node.input}
    kept = [value for value in model.graph.initializer if value.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)


def metadata(config, args, names, differences):
    data = config.DATA
    return {'model': config.MODEL.NAME, 'input': 'images: float32 (batch, 3, height, width), RGB, (value / 255 - mean) / std',
            'size': data.IMAGE_SIZE, 'dynamic_size': args.dynamic, 'crop_pct': data.CROP_PCT, 'interpolation': 'bicubic',
            'background': data.BACKGROUND,         # of transparent pixels, as DATA.BACKGROUND
            'resize': 'the shorter side to size / crop_pct, then the centre size x size', 'mean': list(data.MEAN),
            'std': list(data.STD), 'difference_from_model': differences, 'classes': names}


if __name__ == '__main__':
    parser().run(main)
