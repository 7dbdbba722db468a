"""Every option of the project: its type, default and meaning; and how files and the command line override it.

Order: the defaults below, the files named by BASE (relative to the file that names them, depth first), the file itself,
the command line, whose flags and -opts may not contradict each other. The result is validated and frozen. A key that does
not exist here, or a value of another type, is an error that names the file and the key.
"""
import argparse
import ast
import difflib
import logging
import math
import os
import re

from system import console
from system.console import visible

import yaml
from PIL import ImageColor
from yacs.config import CfgNode as CN

_C = CN()
_C.BASE = []                            # config files to start from, relative to this file
_C.DEVICE = 'auto'                      # auto (a GPU if there is one), gpu or cpu
_C.NPROCS = 0                           # processes that main_multi_gpu.py starts; 0: one per visible GPU, one on CPU
_C.AMP = False                          # mixed precision in training and evaluation (GPU only)
_C.AMP_DTYPE = 'float16'                # float16 (with loss scaling) or bfloat16
_C.SEED = 0                             # decides initialisation, order and augmentation
_C.EVAL = False                         # only evaluate
_C.RESULTS = ''                         # CSV file that an evaluation appends a line to; '': results.csv in the run folder
_C.OUTPUT = ''                          # the run folder; '': a new one below SAVE
_C.SAVE = './output'                    # where run folders are made when OUTPUT is not given
_C.SAVE_FREQ = 1                        # epochs between checkpoints
_C.SAVE_STEPS = 0                       # optimizer steps between checkpoints within an epoch; 0: none
_C.SAVE_MINUTES = 0.0                   # minutes between checkpoints within an epoch; 0: none
_C.SAVE_KEEP = 3                        # newest checkpoints that are kept
_C.REPORT_FREQ = 50                     # optimizer steps between log lines, counted within each epoch
_C.VALIDATE_FREQ = 1                    # epochs between evaluations

_C.DATA = CN()
_C.DATA.DATASET = 'imagenet2012'        # only for the predecessor's commands: every data set has the layout below
_C.DATA.DATA_PATH = './Light_ILSVRC2012'  # a folder with train_list.txt and val_list.txt, lines 'relative/path label'
_C.DATA.BATCH_SIZE = 256                # training images per process and forward pass
_C.DATA.BATCH_SIZE_EVAL = 0             # evaluation images per process and forward pass; 0: as BATCH_SIZE
_C.DATA.IMAGE_SIZE = 256                # side of the square input, pixels
_C.DATA.CROP_PCT = 0.95                 # evaluation: side of the centre crop over the resized shorter side
_C.DATA.MEAN = [0.485, 0.456, 0.406]    # of RGB in [0, 1]
_C.DATA.STD = [0.229, 0.224, 0.225]
_C.DATA.NUM_WORKERS = 2                 # data processes per training process; 0: load in the training process
_C.DATA.BACKEND = 'pillow'              # for training: pillow, or cv2 (OpenCV): faster, not equal; see docs/performance.md
_C.DATA.ON_ERROR = 'raise'              # an unreadable image: raise (stop, naming it) or skip (leave out and count)
_C.DATA.BACKGROUND = 'white'            # colour behind transparent pixels: a name or '#rrggbb'; drop: ignore alpha, as timm
_C.DATA.MAX_PIXELS = 89478485           # larger images are unreadable; one of this size takes up to 1 GB to read
_C.DATA.TIMEOUT = 600                   # seconds that a data process may take for one image; 0: no limit

_C.MODEL = CN()
_C.MODEL.NAME = 'halonet_26t'           # for logs and run folders
_C.MODEL.NUM_CLASSES = 1000             # -1: as many as the data have; 0: a backbone without a classifier
_C.MODEL.STEM = 'tiered'                # tiered (three 3x3), 7x7 or 3x3 (one convolution of that size)
_C.MODEL.STEM_WIDTH = 64                # output channels of the stem
_C.MODEL.STEM_POOL = True               # 3x3 max pooling, stride 2, after the stem; without it a tiered stem ends with stride 2
_C.MODEL.STAGES = ['conv*2', 'conv*2', 'conv halo', 'halo*2']  # blocks of each stage: conv, halo, bot, lambda; KIND*N repeats
_C.MODEL.WIDTHS = [256, 512, 1024, 2048]  # output channels of each stage
_C.MODEL.STRIDES = [1, 2, 2, 2]         # stride of the first block of each stage
_C.MODEL.HEADS = [0, 0, 8, 8]           # attention heads in each stage; 0 where a stage has no attention
_C.MODEL.INNER_WIDTHS = []              # inner width of the blocks of each stage; []: as BOTTLENECK_RATIO says
_C.MODEL.BOTTLENECK_RATIO = 0.25        # inner width of a block over its output width
_C.MODEL.BOTTLENECK_IN = False          # BOTTLENECK_RATIO is over the block's input width instead
_C.MODEL.GROUP_SIZE = 0                 # channels in each group of the 3x3 convolutions; 0: one group
_C.MODEL.CHANNEL_ATTN = 'none'          # after the 3x3 convolutions: none, se (squeeze and excite) or eca
_C.MODEL.SE_RATIO = 0.0625              # se: inner over outer width
_C.MODEL.PROJECTION = True              # a convolution as shortcut where a block changes stride or width; else no shortcut there
_C.MODEL.LINEAR_OUT = False             # no activation at the end of a block
_C.MODEL.BLOCK_SIZE = 8                 # side of a query block, in pixels of the feature map
_C.MODEL.HALO_SIZE = 2                  # pixels around the block that its queries see as well
_C.MODEL.HEAD_DIM = 0                   # width of a query or key head; 0: from QK_RATIO (lambda: 16)
_C.MODEL.QK_RATIO = 1.0                 # width of all queries over the inner width, to the nearest multiple of 8
_C.MODEL.VALUE_RATIO = 1.0              # halo: width of all values over the inner width
_C.MODEL.LAMBDA_SIZE = 13               # lambda: side of the square of positions around a pixel
_C.MODEL.HEAD_WIDTH = 0                 # channels of a last 1x1 convolution, before pooling; 0: none
_C.MODEL.ATTENTION = 'auto'             # fused (compiled; on a CPU convolutions and norms, too), composed (Paddle's) or auto
_C.MODEL.ACT = 'relu'                   # relu or silu
_C.MODEL.DROPOUT = 0.0                  # before the classifier
_C.MODEL.DROPPATH = 0.0                 # stochastic depth of the last block; rises linearly from 0, block by block
_C.MODEL.FREEZE = 0                     # first parts that stay as they are, norms included: 1 the stem, 2 also stage 1, ...
_C.MODEL.FREEZE_NORM = False            # batch norms use and keep their running statistics in training too
_C.MODEL.PRETRAINED = ''                # weights to start from or to evaluate: a file, or a hub's timm/halonet26t.a1h_in1k
_C.MODEL.PRETRAINED_EMA = False         # of a training checkpoint take the moving average of the weights, not the weights
_C.MODEL.RESUME = ''                    # a checkpoint to go on from; auto: the newest good one of the run folder, if any
_C.MODEL.RESUME_FORCE = False           # resume although options or images differ from those of the checkpoint

_C.TRAIN = CN()
_C.TRAIN.NUM_EPOCHS = 300
_C.TRAIN.LAST_EPOCH = -1                # go on after this epoch (counted from 1), once in a run; -1: where the checkpoint is
_C.TRAIN.ACCUM_ITER = 1                 # forward passes per optimizer step
_C.TRAIN.RECOMPUTE = 0                  # first stages that save memory by computing their activations a second time
_C.TRAIN.TO_STATIC = False              # run the forward and backward passes as programs traced by paddle.jit.to_static
_C.TRAIN.OPTIMIZER = 'adamw'            # adamw, sgd (Nesterov momentum), lamb or rmsprop (TensorFlow's)
_C.TRAIN.BASE_LR = 0.001                # learning rate after warm-up, for a global batch of LR_BATCH images
_C.TRAIN.LR_BATCH = 0                   # reference batch of linear learning-rate scaling; 0: BASE_LR is used as it is
_C.TRAIN.LR_SCHEDULE = 'cosine'         # after warm-up: cosine, to END_LR, or step, times DECAY_RATE every DECAY_EPOCHS
_C.TRAIN.DECAY_EPOCHS = 2.4             # step
_C.TRAIN.DECAY_RATE = 0.97              # step
_C.TRAIN.WARMUP_EPOCHS = 5.0            # linear rise from WARMUP_LR, by the step
_C.TRAIN.WARMUP_LR = 1e-6               # learning rate of the first step (not scaled)
_C.TRAIN.END_LR = 1e-6                  # learning rate of the last step, and the least one (not scaled)
_C.TRAIN.COOLDOWN_EPOCHS = 0.0          # epochs with END_LR at the end, part of NUM_EPOCHS
_C.TRAIN.LAYER_DECAY = 1.0              # factor of the learning rate from each block to the one below; 1: the same for all
_C.TRAIN.WEIGHT_DECAY = 0.05            # on matrices and kernels; never on norms, biases and position tables
_C.TRAIN.BETAS = [0.9, 0.999]           # adamw, lamb
_C.TRAIN.EPS = 1e-8                     # adamw, lamb, rmsprop
_C.TRAIN.MOMENTUM = 0.9                 # sgd, rmsprop
_C.TRAIN.RMSPROP_ALPHA = 0.9            # decay of rmsprop's mean square
_C.TRAIN.GRAD_CLIP = 0.0                # limit of the gradients, as CLIP_MODE says; 0: off
_C.TRAIN.CLIP_MODE = 'norm'             # norm of all together, value of each number, or agc: a share of the weights (0.01)
_C.TRAIN.LOSS = 'ce'                    # ce (cross-entropy) or bce (binary cross-entropy of each class)
_C.TRAIN.BCE_THRESHOLD = -1.0           # bce: targets above it are 1 and others 0; below 0: targets stay soft
_C.TRAIN.SMOOTHING = 0.1                # label smoothing
_C.TRAIN.EMA_DECAY = 0.0                # moving average of the weights, decay per optimizer step; 0: off
_C.TRAIN.EMA_WARMUP = 0.0               # power of its warm-up, decay at most 1 - (1 + step) ** -power, such as 2/3; 0: none
_C.TRAIN.AUG_REPEATS = 1                # copies of an image in an epoch of the same length, each augmented for itself
_C.TRAIN.SYNC_BN = False                # batch norms see the images of all processes (GPU only)
_C.TRAIN.CROP_SCALE = [0.08, 1.0]       # random resized crop: share of the area
_C.TRAIN.CROP_RATIO = [0.75, 4.0 / 3.0]  # random resized crop: width over height
_C.TRAIN.HFLIP = 0.5                    # probability of a mirrored image
_C.TRAIN.AUTO_AUGMENT = ''              # timm's grammar, such as rand-m9-mstd0.5-inc1 or original; '': off
_C.TRAIN.COLOR_JITTER = 0.0             # brightness, contrast and saturation factors in 1 +- this, without AUTO_AUGMENT
_C.TRAIN.RANDOM_ERASE_PROB = 0.0        # probability of erasing a rectangle
_C.TRAIN.RANDOM_ERASE_MODE = 'pixel'    # pixel (normal noise) or const (the mean colour)
_C.TRAIN.MIXUP_ALPHA = 0.0              # Beta parameter of mixup; 0: off
_C.TRAIN.CUTMIX_ALPHA = 0.0             # Beta parameter of cutmix; 0: off
_C.TRAIN.MIXUP_MODE = 'batch'           # what shares a draw: batch, pair, elem; half: pair, of which one image is kept
_C.TRAIN.MIXUP_PROB = 1.0               # probability that what shares a draw is mixed at all
_C.TRAIN.MIXUP_SWITCH_PROB = 0.5        # probability of cutmix where both are on

OF_ONE_START = (                                    # asked of one start: RUN/config.yaml does not hold these
    'DEVICE', 'NPROCS', 'EVAL', 'RESULTS', 'OUTPUT', 'SAVE', 'MODEL.PRETRAINED', 'MODEL.PRETRAINED_EMA', 'MODEL.RESUME',
    'MODEL.RESUME_FORCE', 'TRAIN.LAST_EPOCH')
OLDEST_OF_ONE_START = (                             # those that every version had
    'DEVICE', 'NPROCS', 'EVAL', 'OUTPUT', 'SAVE', 'MODEL.PRETRAINED', 'MODEL.RESUME', 'TRAIN.LAST_EPOCH')
CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configs')
PATHS = ('RESULTS', 'OUTPUT', 'SAVE', 'DATA.DATA_PATH', 'MODEL.PRETRAINED', 'MODEL.RESUME')      # where ~ is a home folder
CHOICES = {
    'DEVICE': ('auto', 'gpu', 'cpu'),
    'AMP_DTYPE': ('float16', 'bfloat16'),
    'DATA.DATASET': ('imagenet2012',),
    'DATA.BACKEND': ('pillow', 'cv2'),
    'DATA.ON_ERROR': ('raise', 'skip'),
    'MODEL.STEM': ('tiered', '7x7', '3x3'),
    'MODEL.CHANNEL_ATTN': ('none', 'se', 'eca'),
    'MODEL.ATTENTION': ('auto', 'fused', 'composed'),
    'MODEL.ACT': ('relu', 'silu'),
    'TRAIN.OPTIMIZER': ('adamw', 'sgd', 'lamb', 'rmsprop'),
    'TRAIN.LR_SCHEDULE': ('cosine', 'step'),
    'TRAIN.CLIP_MODE': ('norm', 'value', 'agc'),
    'TRAIN.LOSS': ('ce', 'bce'),
    'TRAIN.MIXUP_MODE': ('batch', 'pair', 'elem', 'half'),
    'TRAIN.RANDOM_ERASE_MODE': ('pixel', 'const'),
}
AT_LEAST = {
    'NPROCS': 0, 'SEED': 0, 'SAVE_FREQ': 1, 'SAVE_STEPS': 0, 'SAVE_MINUTES': 0, 'SAVE_KEEP': 1, 'REPORT_FREQ': 1,
    'VALIDATE_FREQ': 1,
    'DATA.BATCH_SIZE': 1, 'DATA.BATCH_SIZE_EVAL': 0, 'DATA.IMAGE_SIZE': 1, 'DATA.NUM_WORKERS': 0,
    'DATA.MAX_PIXELS': 1, 'DATA.TIMEOUT': 0,
    'MODEL.NUM_CLASSES': -1, 'MODEL.STEM_WIDTH': 8, 'MODEL.GROUP_SIZE': 0, 'MODEL.BLOCK_SIZE': 1, 'MODEL.HALO_SIZE': 0,
    'MODEL.HEAD_DIM': 0, 'MODEL.HEAD_WIDTH': 0, 'MODEL.FREEZE': 0, 'TRAIN.RECOMPUTE': 0,
    'TRAIN.NUM_EPOCHS': 1, 'TRAIN.LAST_EPOCH': -1, 'TRAIN.ACCUM_ITER': 1, 'TRAIN.BASE_LR': 0, 'TRAIN.LR_BATCH': 0,
    'TRAIN.WARMUP_EPOCHS': 0, 'TRAIN.WARMUP_LR': 0, 'TRAIN.END_LR': 0, 'TRAIN.WEIGHT_DECAY': 0, 'TRAIN.GRAD_CLIP': 0,
    'TRAIN.COOLDOWN_EPOCHS': 0, 'TRAIN.MOMENTUM': 0, 'TRAIN.SMOOTHING': 0,
    'TRAIN.BCE_THRESHOLD': -1, 'TRAIN.EMA_WARMUP': 0, 'TRAIN.AUG_REPEATS': 1,
    'TRAIN.COLOR_JITTER': 0, 'TRAIN.MIXUP_ALPHA': 0, 'TRAIN.CUTMIX_ALPHA': 0,
}
AT_MOST = {'NPROCS': 1024, 'DATA.NUM_WORKERS': 1024, 'DATA.IMAGE_SIZE': 16384, 'DATA.CROP_PCT': 1}
ABOVE = {                                           # the value itself is not allowed
    'DATA.CROP_PCT': 0, 'MODEL.BOTTLENECK_RATIO': 0, 'MODEL.SE_RATIO': 0, 'MODEL.QK_RATIO': 0, 'MODEL.VALUE_RATIO': 0,
    'TRAIN.DECAY_EPOCHS': 0, 'TRAIN.EPS': 0,
}
BELOW = {                                           # nor is it here
    'MODEL.DROPOUT': 1,                             # at 1 nothing would be left to learn from
    'MODEL.DROPPATH': 1,
    'TRAIN.SMOOTHING': 1,                           # at 1 all labels would be the same
    'TRAIN.MOMENTUM': 1,                            # at 1 nothing would ever slow down
    'TRAIN.EMA_DECAY': 1,                           # at 1 the average would never move
    'TRAIN.BCE_THRESHOLD': 1,
}
LARGEST = 2 ** 63 - 1                               # of whole numbers: what 64 bits hold
PROBABILITIES = (
    'MODEL.DROPOUT', 'MODEL.DROPPATH', 'TRAIN.EMA_DECAY', 'TRAIN.HFLIP', 'TRAIN.RANDOM_ERASE_PROB', 'TRAIN.MIXUP_PROB',
    'TRAIN.MIXUP_SWITCH_PROB', 'TRAIN.LAYER_DECAY', 'TRAIN.DECAY_RATE', 'TRAIN.RMSPROP_ALPHA',
)


def get_config(cfg_file=None, opts=()):
    """Defaults, then `cfg_file` with its BASE files, then `opts` = [KEY, VALUE, KEY, VALUE, ...]; validated and frozen.

    Raises ValueError for an unknown key, a value of another type or outside its range, and FileNotFoundError.
    """
    config = _C.clone()
    if cfg_file:
        _merge_file(config, find_config(cfg_file), above=())
    opts = list(opts)
    if len(opts) % 2:
        raise ValueError(f'-opts takes pairs KEY VALUE; {opts[-1]!r} has no value')
    for key, value in zip(opts[::2], opts[1::2]):
        _set(config, key, value, 'command line')
    for key in PATHS:
        _put(config, key, _expand_home(key, _get(config, key)))
    _choose_weights(config, explicit=opts[::2])
    _validate(config)
    config.freeze()
    return config


def find_config(name):
    """The path of the config file `name`: a file, or the name of a file or a model in configs/, such as halonet_26t.

    Raises FileNotFoundError.
    """
    path = os.path.expanduser(os.fspath(name))
    if os.path.isfile(path):
        return path
    folder, stem = os.path.split(path.removesuffix('.yaml'))
    known = sorted(file.removesuffix('.yaml') for file in os.listdir(CONFIGS) if file.endswith('.yaml'))
    if folder in ('', 'configs'):
        found = [file for file in known if file == stem or re.fullmatch(rf'{re.escape(stem)}_\d+', file)]
        if len(found) == 1:
            return os.path.join(CONFIGS, f'{found[0]}.yaml')
    names = {**{re.sub(r'_\d+$', '', file): file for file in known}, **{file: file for file in known}}
    close = difflib.get_close_matches(stem, names, n=1)
    hint = f'; did you mean configs/{names[close[0]]}.yaml?' if close else ''
    raise FileNotFoundError(f'{os.path.abspath(path)}: no such config file{hint}')


def changed(config, key, value):
    """A frozen copy of a config in which the option `key` has another value."""
    copy = config.clone()
    copy.defrost()
    _put(copy, key, value)
    copy.freeze()
    return copy


def dump_run(config):
    """The text of RUN/config.yaml, or of an evaluation's config_eval.yaml: all options but those of one start.

    An evaluation keeps EVAL, so that nobody starts a training with its file by mistake.
    """
    left = config.clone()
    left.defrost()
    for key in OF_ONE_START:
        if key != 'EVAL' or not config.EVAL:
            *groups, name = key.split('.')
            del _node(left, groups)[name]
    return left.dump()


def parse_args(argv=None):
    """The command line (default: sys.argv) -> config. A wrong option or value ends the program with one clear line."""
    console.prepare()
    parser = Parser(description='Train or evaluate a HaloNet.')
    parser.elsewhere = {key.split('.')[-1].lower(): f'-opts {key}' for key in flatten(_C)}

    def add(name, key, help, **kwargs):
        parser.add(name, help, dest=key, default=None, **kwargs)

    parser.add('cfg', 'config file, or the name of one in configs/, such as halonet_26t', metavar='FILE')
    add('data_path', 'DATA.DATA_PATH', 'folder with train_list.txt and val_list.txt', metavar='DIR')
    add('dataset', 'DATA.DATASET', 'imagenet2012: the list-file layout of the README')
    add('batch_size', 'DATA.BATCH_SIZE', 'training images per process', metavar='N')
    add('batch_size_eval', 'DATA.BATCH_SIZE_EVAL', 'evaluation images per process', metavar='N')
    add('image_size', 'DATA.IMAGE_SIZE', 'side of the input in pixels', metavar='N')
    add('num_workers', 'DATA.NUM_WORKERS', 'data processes per training process', metavar='N')
    add('accum_iter', 'TRAIN.ACCUM_ITER', 'forward passes per optimizer step', metavar='N')
    add('pretrained', 'MODEL.PRETRAINED', 'weights to start from or to evaluate, or a hub name', metavar='FILE')
    add('resume', 'MODEL.RESUME', 'a checkpoint to go on from, or auto: the newest good one of the run folder', metavar='FILE')
    add('last_epoch', 'TRAIN.LAST_EPOCH', 'go on after this epoch; only once in a run', metavar='N')
    add('output', 'OUTPUT', 'the run folder', metavar='DIR')
    add('results', 'RESULTS', 'CSV file that an evaluation appends a line to', metavar='FILE')
    add('device', 'DEVICE', 'auto, gpu or cpu')
    add('nprocs', 'NPROCS', 'processes that main_multi_gpu.py starts', metavar='N')
    parser.add_argument('-ngpus', '--ngpus', dest='NPROCS', help=argparse.SUPPRESS)  # its name in PaddleViT's first version
    add('eval', 'EVAL', 'only evaluate', action='store_const', const=True)
    add('amp', 'AMP', 'mixed precision (GPU)', action='store_const', const=True)
    parser.add_argument('-opts', '--opts', nargs='+', action='extend', default=[], metavar='KEY VALUE',
                        help='any other option of config.py')
    args = vars(parser.parse_args(argv))
    cfg_file, opts = args.pop('cfg'), args.pop('opts')
    flags = {key: value for key, value in args.items() if value is not None}
    try:
        return get_config(cfg_file, with_opts(flags, opts))
    except (ValueError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')


def with_opts(flags, opts):
    """Options by flags, {KEY: value}, and the words KEY VALUE ... after -opts -> the `opts` of get_config.

    Raises ValueError for an option that both give, with different values: neither is clearly meant.
    """
    defaults = flatten(_C)
    for key, value in zip(opts[::2], opts[1::2]):
        if key in flags:
            by_flag, by_opts = (_coerce(text, defaults[key], f'command line: {key}') for text in (flags[key], value))
            if by_flag != by_opts:
                flag = key.split('.')[-1].lower()
                raise ValueError(f'-{flag} says {by_flag!r} and -opts {key} says {by_opts!r}, of the same option; leave one out')
    return [item for pair in flags.items() for item in pair] + list(opts)


class Parser(argparse.ArgumentParser):
    """Options with one dash or two; a mistake is one line that names the nearest option, and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)
        self.elsewhere = {}                         # other words that users try -> what they mean

    def add(self, name, help, **kwargs):
        self.add_argument(f'-{name}', f'--{name}', help=help, **kwargs)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f'unrecognized arguments: {" ".join(unknown)}{self._hint(unknown)}')
        return args

    def _hint(self, unknown):
        word = next((word for word in unknown if word.startswith('-')), '')
        known = {name.lstrip('-'): name for name in self._option_string_actions if not name.startswith('--')}
        known = {**self.elsewhere, **known}
        close = difflib.get_close_matches(word.lstrip('-').split('=')[0], known, n=1, cutoff=0.7)
        return f'; did you mean {known[close[0]]}?' if close else ''

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message} (-h shows the options)\n')

    def exit(self, status=0, message=None):
        super().exit(status, visible(message) if message else None)


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first would be lost."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f'{twice} stands twice', node.start_mark)
        return super().construct_mapping(node, deep)


def _merge_file(config, path, above):
    """Put a file with its BASE files into the config. Returns {KEY: (value, the file that told it)}."""
    path = os.path.abspath(path)
    if path in above:
        raise ValueError('BASE files form a cycle: ' + ' -> '.join(above + (path,)))
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such config file' + (f' (a BASE of {above[-1]})' if above else ''))
    with open(path, encoding='utf-8') as file:
        try:
            content = yaml.load(file, _Loader) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f'{path}: not valid YAML: ' + ' '.join(str(error).split())) from None
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected KEY: VALUE lines, found {type(content).__name__}')
    _leave_out_an_old_start(content, path)
    base = content.pop('BASE', None) or []
    told = {}
    for name in _coerce([base] if isinstance(base, str) else base, [''], f'{path}: BASE'):
        if name:                                    # the predecessor writes BASE: ['']
            more = _merge_file(config, os.path.join(os.path.dirname(path), name), above + (path,))
            _refuse_undoing(told, more, name, path)
            told.update(more)
    return {**told, **_merge_dict(config, content, path, prefix='')}


def _leave_out_an_old_start(content, path):
    """Remove from a file that a run of an earlier version wrote the options that say which weights that start used.

    Such a file states every option. In files that people write, which state some, these options stay.
    """
    values = dict(_flat(content))
    if not {'BASE', *OLDEST_OF_ONE_START} <= values.keys():
        return
    for key in OF_ONE_START[-5:]:
        *groups, name = key.split('.')
        default = _get(_C, key)
        if values.get(key, default) != default:
            logging.getLogger('halonet').warning(
                '%s: %s %s was asked of the start that wrote this file, and is left out', path, key, values[key])
        _node(content, groups).pop(name, None)


def _flat(tree, prefix=''):
    for key, value in tree.items():
        yield from _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else [(f'{prefix}{key}', value)]


def _merge_dict(config, content, source, prefix):
    told = {}
    for key, value in content.items():
        key = f'{prefix}{key}'
        if isinstance(value, dict):
            told.update(_merge_dict(config, value, source, prefix=f'{key}.'))
        else:
            told[key] = (_set(config, key, value, source), source)
    return told


def _refuse_undoing(told, more, name, path):
    """Raise ValueError where `name`, of the BASE of `path`, undoes in silence what the entries before it told.

    It may change an option by a line of its own, but not by a BASE, which it has for what it leaves open itself; and a
    model's recipe may not mix with one that stands before the model.
    """
    own = os.path.abspath(os.path.join(os.path.dirname(path), name))
    is_model = 'MODEL.NAME' in more and 'MODEL.NAME' not in told
    for key, (value, source) in more.items():
        before, whose = told.get(key, (value, source))
        if before != value and (is_model or source != own):
            raise ValueError(f'{path}: BASE names {name} too late: it would turn {key} from {before!r} (of {whose}) to {value!r} '
                             f'(of {source}); name it before what is to override it')


def _set(config, key, value, source):
    if key == 'BASE':
        raise ValueError(f'{source}: BASE has a meaning in config files only')
    *groups, name = str(key).split('.')
    node = config
    for group in groups:
        node = node.get(group) if isinstance(node, CN) else None
    if not isinstance(node, CN) or name not in node:
        close = _similar(key)
        raise ValueError(f'{source}: unknown option {key}' + (f'; did you mean {close}?' if close else ''))
    if isinstance(node[name], CN):
        raise ValueError(f'{source}: {key} is a group of options, not an option')
    node[name] = _coerce(value, node[name], f'{source}: {key}')
    return node[name]


def _coerce(value, default, where):
    """`value` as the type of `default`; a string is read as a Python literal where the option is not a string."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass                                    # the check of the type below names it
    if isinstance(default, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)                          # a folder may be called 7
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(default, list) and isinstance(value, (list, tuple)):
        return [_coerce(item, default[0], where) for item in value] if default else list(value)
    if type(value) is not type(default):
        raise ValueError(f'{where} must be {_kind(default)}, got {value!r}')
    return value


def _kind(value):
    return {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text', list: 'a list'}[type(value)]


def _similar(key):
    return ', '.join(difflib.get_close_matches(key, flatten(_C), n=1))


def defaults():
    """{'GROUP.KEY': default} of every option."""
    return flatten(_C)


def flatten(config):
    """A config as {'GROUP.KEY': value}."""
    return dict(_flat(config))


def _node(tree, groups):
    for group in groups:
        tree = tree[group]
    return tree


def _get(config, key):
    *groups, name = key.split('.')
    return _node(config, groups)[name]


def _put(config, key, value):
    *groups, name = key.split('.')
    _node(config, groups)[name] = value


def _expand_home(key, path):
    """`path` with the home folder for ~ or ~user at its start. Raises ValueError where there is no such user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith('~'):
        raise ValueError(f'{key} is {path}: there is no such user; write ./{path} for a file of that name')
    return expanded


def _choose_weights(config, explicit):
    """Let the command line, whose keys are `explicit`, decide between MODEL.PRETRAINED and MODEL.RESUME.

    Raises ValueError where neither or both of the two are explicit. A training may have both with RESUME auto: it starts
    from PRETRAINED if its run folder holds no checkpoint.
    """
    model = config.MODEL
    if not model.PRETRAINED or not model.RESUME or model.RESUME == 'auto' and not config.EVAL:
        return
    named = {key for key in ('PRETRAINED', 'RESUME') if f'MODEL.{key}' in explicit}
    if len(named) != 1:
        hint = '' if config.EVAL else ' (-resume auto uses -pretrained if there is no checkpoint yet)'
        raise ValueError(f'-pretrained {model.PRETRAINED} and -resume {model.RESUME} name different weights; '
                         f'leave one of them out{hint}')
    model['RESUME' if 'PRETRAINED' in named else 'PRETRAINED'] = ''


def _check_color(key, value):
    if value == 'drop':
        return
    try:
        known = len(ImageColor.getrgb(value)) == 3
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{key} is {value!r}; it can be a colour such as white or '#808080', or drop")


def _validate(config):
    flat = flatten(config)
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            raise ValueError(f'{key} is {flat[key]!r}; it can be ' + ' or '.join(choices))
    for key, value in flat.items():
        _refuse_absurd_numbers(key, value)
    for key, least in AT_LEAST.items():
        if flat[key] < least:
            raise ValueError(f'{key} is {flat[key]}; it must be at least {least}')
    for key, most in AT_MOST.items():
        if flat[key] > most:
            raise ValueError(f'{key} is {flat[key]}; it must be at most {most}')
    for key, limit in ABOVE.items():
        if flat[key] <= limit:
            raise ValueError(f'{key} is {flat[key]}; it must be above {limit}')
    for key, limit in BELOW.items():
        if flat[key] >= limit:
            raise ValueError(f'{key} is {flat[key]}; it must be below {limit}')
    for key in PROBABILITIES:
        if not 0 <= flat[key] <= 1:
            raise ValueError(f'{key} is {flat[key]}; it must lie between 0 and 1')
    _validate_data(config, flat)
    _validate_training(config)
    _validate_model(config, flat)


def _refuse_absurd_numbers(key, value):
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f'{key} is {value}; it must be a finite number')
        if isinstance(number, int) and abs(number) > LARGEST:
            raise ValueError(f'{key} is {value}; whole numbers must be at most {LARGEST}')


def _validate_data(config, flat):
    mean, std = config.DATA.MEAN, config.DATA.STD
    if len(mean) != 3 or not all(0 <= value <= 1 for value in mean):
        raise ValueError(f'DATA.MEAN is {mean}; it must be three numbers from 0 to 1, of RGB. Divide by 255 those of pixels '
                         'from 0 to 255')
    if len(std) != 3 or not all(0 < value <= 1 for value in std):
        raise ValueError(f'DATA.STD is {std}; it must be three numbers above 0 and not above 1, of RGB. Divide by 255 those of '
                         'pixels from 0 to 255')
    _check_color('DATA.BACKGROUND', config.DATA.BACKGROUND)
    for key in ('TRAIN.CROP_SCALE', 'TRAIN.CROP_RATIO'):
        if len(flat[key]) != 2 or not 0 < flat[key][0] <= flat[key][1]:
            raise ValueError(f'{key} is {flat[key]}; it must be [smallest, largest], both above 0')
    if config.TRAIN.CROP_SCALE[1] > 1:
        raise ValueError(f'TRAIN.CROP_SCALE is {config.TRAIN.CROP_SCALE}; a crop cannot exceed the image (1.0)')


def _validate_training(config):
    if not config.TRAIN.WARMUP_EPOCHS + config.TRAIN.COOLDOWN_EPOCHS < config.TRAIN.NUM_EPOCHS:
        raise ValueError(f'TRAIN.WARMUP_EPOCHS {config.TRAIN.WARMUP_EPOCHS} and TRAIN.COOLDOWN_EPOCHS '
                         f'{config.TRAIN.COOLDOWN_EPOCHS} leave none of TRAIN.NUM_EPOCHS {config.TRAIN.NUM_EPOCHS}; '
                         'lower them or raise it')
    if config.TRAIN.LAST_EPOCH > config.TRAIN.NUM_EPOCHS:
        raise ValueError(f'TRAIN.LAST_EPOCH is {config.TRAIN.LAST_EPOCH}, after the last of TRAIN.NUM_EPOCHS '
                         f'{config.TRAIN.NUM_EPOCHS}; nothing would be trained')
    if len(config.TRAIN.BETAS) != 2 or not all(0 <= beta < 1 for beta in config.TRAIN.BETAS):
        raise ValueError(f'TRAIN.BETAS is {config.TRAIN.BETAS}; it must be two numbers from 0 up to and without 1')


def _validate_model(config, flat):
    for key in ('MODEL.WIDTHS', 'MODEL.STRIDES'):
        if min(flat[key], default=0) < 1:
            raise ValueError(f'{key} is {flat[key]}; each stage, at least one, needs a number of 1 or more')
    stages = len(config.MODEL.STAGES)
    for key in ('WIDTHS', 'STRIDES', 'HEADS'):
        if len(config.MODEL[key]) != stages:
            raise ValueError(f'MODEL.{key} has {len(config.MODEL[key])} entries and MODEL.STAGES has {stages}; '
                             'they describe the same stages')
    inner = config.MODEL.INNER_WIDTHS
    if inner and (len(inner) != stages or not all(type(width) is int and width > 0 for width in inner)):
        raise ValueError(f'MODEL.INNER_WIDTHS is {inner}; it must be [], or a whole number above 0 for each of {stages} stages')
    if min(config.MODEL.HEADS, default=0) < 0:
        raise ValueError(f'MODEL.HEADS is {config.MODEL.HEADS}; no number of heads can be below 0')
    if config.MODEL.LAMBDA_SIZE < 1 or config.MODEL.LAMBDA_SIZE % 2 == 0:
        raise ValueError(f'MODEL.LAMBDA_SIZE is {config.MODEL.LAMBDA_SIZE}; it must be an odd number, to have a middle')
    if config.TRAIN.RECOMPUTE > stages:
        raise ValueError(f'TRAIN.RECOMPUTE is {config.TRAIN.RECOMPUTE}, and there are {stages} stages')
    if config.TRAIN.RECOMPUTE and config.TRAIN.TO_STATIC:
        raise ValueError('TRAIN.RECOMPUTE works in eager mode only; leave it 0 or TRAIN.TO_STATIC False')
    if config.MODEL.FREEZE > stages + 1:
        raise ValueError(f'MODEL.FREEZE is {config.MODEL.FREEZE}; it can be at most {stages + 1}: the stem and {stages} stages')
