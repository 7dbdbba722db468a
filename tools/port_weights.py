"""Convert weights between the formats that weights.py reads and those that Paddle (.pdparams) and timm (.safetensors) use.

SRC is any file or hub name that -pretrained takes: ours, PaddleViT's, a training checkpoint, timm's .safetensors or .pth.
The copy is read back and compared with the source, number by number, before it gets its name; with --cfg a model loads it too.
"""
import argparse
import os
import pickle
import sys

import numpy as np
from safetensors.numpy import save

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils  # noqa: E402
import weights  # noqa: E402
from config import get_config  # noqa: E402
from halonet import build_halonet  # noqa: E402

FORMATS = {'.pdparams': 'paddle', '.safetensors': 'timm'}


def encode(state, ending, to):
    """A state dict of ours -> the bytes of a file with that ending, in Paddle's or timm's names and layout."""
    state = weights.to_timm(state) if to == 'timm' else state
    state = {key: np.ascontiguousarray(value) for key, value in state.items()}
    return pickle.dumps(state, protocol=4) if ending == '.pdparams' else save(state, {'format': 'pt' if to == 'timm' else 'np'})


def compare(state, copy):
    """Raises ValueError unless two state dicts are equal in keys, types, shapes and every bit (NaN equals itself)."""
    wrong = sorted(key for key in {*state, *copy} if key not in state or key not in copy or state[key].dtype != copy[key].dtype
                   or state[key].shape != copy[key].shape or state[key].tobytes() != copy[key].tobytes())
    if wrong:
        raise ValueError(f'the copy differs from the source in {len(wrong)} entries: ' + ', '.join(wrong[:20]))


def check_model(cfg, state):
    """Raises ValueError unless the model of a config loads `state`, and then holds it."""
    model = build_halonet(get_config(cfg))
    try:
        model.set_state_dict(state)
    except ValueError as error:
        raise ValueError(f'--cfg {cfg}: {error}') from None
    compare({key: value.astype('float32') for key, value in state.items()},
            {key: value.numpy() for key, value in model.state_dict().items()})


def port(source, target, *, cfg='', to='', ema=False, force=False):
    """Convert `source` to the file `target`; returns how many arrays and numbers. Raises ValueError, FileNotFoundError."""
    ending = os.path.splitext(target)[1]
    if ending not in FORMATS:
        raise ValueError(f'{target}: the ending must be one of {", ".join(FORMATS)}; both are read by Paddle, the latter by timm')
    to = to or FORMATS[ending]
    if (to, ending) == ('timm', '.pdparams'):
        raise ValueError(f'{target}: timm reads .safetensors, not .pdparams')
    if os.path.exists(target) and not force:
        raise ValueError(f'{target} exists; --force overwrites it')
    state = weights.to_ours(weights.read(weights.find(source), ema))

    def write(file):
        file.write(encode(state, ending, to))
        file.flush()
        copy = weights.to_ours(weights.read(file.name))
        compare(state, copy)
        if cfg:
            check_model(cfg, copy)

    utils.atomic_write(target, write)
    return len(state), sum(value.size for value in state.values())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='SRC', help='a weight file, a checkpoint, or a hub name (timm/halonet26t.a1h_in1k)')
    parser.add_argument('target', metavar='DST', help='the file to write: NAME.pdparams or NAME.safetensors')
    parser.add_argument('--cfg', metavar='FILE', default='', help='config of the model; checks that it loads the copy')
    parser.add_argument('--to', choices=('paddle', 'timm'), default='', help='whose names (default: timm in .safetensors)')
    parser.add_argument('--ema', action='store_true', help='of a training checkpoint take the moving average of the weights')
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    args = parser.parse_args(argv)
    try:
        arrays, numbers = port(args.source, args.target, cfg=args.cfg, to=args.to, ema=args.ema, force=args.force)
    except (ValueError, OSError) as error:
        parser.exit(1, f'{parser.prog}: error: {error}\n')
    print(f'{args.target}: {arrays} arrays, {numbers / 1e6:.2f} M numbers, equal to those of {args.source}'
          + (f'; the model of {args.cfg} loads them' if args.cfg else ''))


if __name__ == '__main__':
    main()
