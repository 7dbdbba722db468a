"""Convert a weight file into Paddle's and PaddleViT's (.pdparams) or timm's (.safetensors).

SRC is any file or hub name that -pretrained takes: ours, PaddleViT's, a training checkpoint, timm's
.safetensors or .pth. The copy is read back and compared with the source, number by number, before it gets
its name. With -cfg a model loads it too.

  python tools/port_weights.py timm/halonet26t.a1h_in1k halonet26t.pdparams -cfg configs/halonet_26t_256.yaml
  python tools/port_weights.py runs/26t/checkpoints/step_00001000.pdckpt model.safetensors -ema
  python tools/port_weights.py runs/flowers/best.pdparams flowers_hub -to hub

-to hub makes the folder DST as timm and the Hugging Face hub expect it: model.safetensors, config.json with
the class names, and a card. It needs one of timm's networks, and -cfg or the config.yaml beside SRC.

Exit status: 0, or 2 for a mistake in the command or a file that does not fit.
"""
import argparse
import os
import pickle
import sys
import tempfile
from typing import BinaryIO, Callable, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system import files
from tools import cli, hub_folder

import numpy as np
from safetensors.numpy import save

from config import get_config
from halonet import build_halonet
from model import hub, weights

FORMATS = {'.pdparams': ('paddle', 'paddlevit'), '.safetensors': ('timm', 'paddle')}     # the default first
NAMES: dict[str, Callable] = {'paddle': dict, 'paddlevit': weights.to_paddlevit, 'timm': weights.to_timm}
SHOWN_KEYS = 20

State = dict[str, np.ndarray]


def encode(state: State, ending: str, to: str) -> bytes:
    """Encode a state dict of ours as a file with that ending, in the names and layout of NAMES[to]."""
    state = {key: np.asarray(value, order='C') for key, value in NAMES[to](state).items()}
    if ending == '.safetensors':
        return save(state, {'format': 'pt' if to == 'timm' else 'np'})
    return pickle.dumps(state, protocol=4)


def compare(state: State, copy: State) -> None:
    """Raise ValueError unless two state dicts have equal keys, dtypes, shapes and bits. NaN equals itself."""
    wrong = []
    for key in sorted({*state, *copy}):
        if key not in state or key not in copy or not is_equal(state[key], copy[key]):
            wrong.append(key)
    if wrong:
        raise ValueError(f'the copy differs from the source in {len(wrong)} entries: '
                         + ', '.join(wrong[:SHOWN_KEYS]))


def is_equal(one: np.ndarray, other: np.ndarray) -> bool:
    """True if two arrays have the same dtype, shape and bits."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def check_model(cfg: str, state: State) -> None:
    """Raise ValueError unless the model of a config loads `state` and then holds it."""
    model = build_halonet(get_config(cfg))
    try:
        weights.load_strictly(model, state)
    except ValueError as error:
        raise ValueError(f'-cfg {cfg}: {error}') from None
    compare({key: value.astype('float32') for key, value in state.items()},
            {key: value.numpy() for key, value in model.state_dict().items()})


def port_to_hub(source: str, folder: str, *, cfg: str = '', ema: bool = False,
                classes: Optional[str] = None) -> tuple[int, int]:
    """Convert `source` to a hub folder. Returns the counts of arrays and of numbers.

    classes: a file of class names; without it those beside the weights. Raises ValueError and
    FileNotFoundError; then there is no folder.
    """
    cli.check_new_folder(folder)
    state = weights.to_ours(weights.read(hub.find(source), ema))
    if weights.HEAD[0] not in state:
        raise ValueError(f'{source}: it has no classifier ({weights.HEAD[0]}), which a hub model needs')
    classifier = ['MODEL.NUM_CLASSES', state[weights.HEAD[0]].shape[-1]]
    config = cli.config_of(argparse.Namespace(
        cfg=cfg, pretrained=source, image_size=None, crop_pct=None, device=None, opts=classifier))
    hub_folder.architecture(config)                 # an unknown one is a better reason than its shapes
    model = build_halonet(config)
    weights.load_strictly(model, state)
    names = cli.find_class_names(config, classes)
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix='.hub-') as temporary:
        hub_folder.write(temporary, config, model, encode(state, '.safetensors', 'timm'), names)
        compare(state, weights.to_ours(weights.read(hub.find(temporary))))
        cli.move_content(temporary, folder)
    return len(state), sum(value.size for value in state.values())


def choose_names(target: str, to: str) -> tuple[str, str]:
    """Return the ending of `target`, and `to` or its default. Raises ValueError where they do not match."""
    ending = os.path.splitext(target)[1]
    if ending not in FORMATS:
        raise ValueError(f'{target}: the ending must be {" or ".join(FORMATS)}; '
                         'timm and PyTorch read .safetensors')
    to = to or FORMATS[ending][0]
    if to not in FORMATS[ending]:
        endings = ' or '.join(ending for ending, names in FORMATS.items() if to in names)
        raise ValueError(f'{target}: -to {to} writes {endings}, not {ending}')
    return ending, to


def port(source: str, target: str, *, cfg: str = '', to: str = '', ema: bool = False,
         force: bool = False) -> tuple[int, int]:
    """Convert `source` to the file `target`. Returns the counts of arrays and of numbers.

    Raises ValueError and FileNotFoundError; then `target` is unchanged.
    """
    ending, to = choose_names(target, to)
    if os.path.exists(target) and not force:
        raise ValueError(f'{target} exists; -force overwrites it')
    state = weights.to_ours(weights.read(hub.find(source), ema))

    def write(file: BinaryIO) -> None:
        file.write(encode(state, ending, to))
        file.flush()
        copy = weights.to_ours(weights.read(file.name))
        compare(state, copy)
        if cfg:
            check_model(cfg, copy)

    files.atomic_write(target, write)
    return len(state), sum(value.size for value in state.values())


def parser() -> cli.Parser:
    options = cli.Parser(__doc__)
    options.add_argument('source', metavar='SRC',
                         help='a weight file, a checkpoint, or a hub name (timm/halonet26t.a1h_in1k)')
    options.add_argument('target', metavar='DST',
                         help='the file to write, NAME.pdparams or NAME.safetensors; for -to hub a folder')
    options.add('cfg', 'config of the model; checks that it loads the copy', metavar='FILE', default='')
    options.add('to', 'whose names: paddle (ours; default in .pdparams), paddlevit (in .pdparams, models '
                'like its two only) or timm (default in .safetensors); hub: a folder',
                choices=[*NAMES, 'hub'], default='')
    options.add('classes', 'class names for -to hub (default: the class_names.txt beside the weights)',
                metavar='FILE')
    options.add('ema', 'of a training checkpoint take the moving average of the weights', action='store_true')
    options.add('force', 'overwrite DST', action='store_true')
    return options


def main(args: argparse.Namespace) -> int:
    if args.to == 'hub':
        arrays, numbers = port_to_hub(
            args.source, args.target, cfg=args.cfg, ema=args.ema, classes=args.classes)
    else:
        arrays, numbers = port(
            args.source, args.target, cfg=args.cfg, to=args.to, ema=args.ema, force=args.force)
    loaded = f'; the model of {args.cfg} loads them' if args.cfg else ''
    print(f'{args.target}: {arrays} arrays, {numbers / 1e6:.2f} M numbers, '
          f'equal to those of {args.source}{loaded}')
    return 0


if __name__ == '__main__':
    parser().run(main)
