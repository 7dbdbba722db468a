"""Every option of the project, and how files and the command line override the defaults.

Order: the defaults below, the files named by BASE (relative to the file that names them, depth first),
the file itself, the command line. A flag and -opts may not contradict each other. The result is checked
and frozen. An unknown key, or a value of another type, is an error that names the file and the key.

The columns of the table are the key, the default, whose type is the type of the option, and the meaning.
Then, where needed:

choices          the values that the option can have
ge, gt, le, lt   limits: >=, >, <=, < (of each number of a list); length is that of a list
items            type of the items of a list that is empty by default
is_size          True: a size of images, one number or [height, width]
path             FILE or DIR: the option is a path, and ~ at its start is the home folder
flag             the command line has a flag, named by the last part of the key: -batch_size
on_resume        may a resumed run change the option? fixed (the default): no, it decides the results;
                 product: yes, if the images per optimizer step stay the same; free: yes;
                 unsaved: each start gives it, and RUN/config.yaml does not hold it
"""
from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from system import console
from system.command_line import Parser
from system.options import ConfigFiles, Option, Relation, Table, find_file, flatten, tree

from PIL import ImageColor
from yacs.config import CfgNode

OF_PIXELS = 'Divide by 255 those of pixels from 0 to 255'

OPTIONS = (
    # ---- where and how to run, and what to write
    Option('BASE',          [],         'config files to start from, relative to this file',
                                        items=str, on_resume='free'),
    Option('DEVICE',        'auto',     "auto (a GPU if there is one), cpu, gpu, gpu:1 (the second one), or "
                                        "another device that Paddle was built for",
                                        flag=True, on_resume='unsaved'),
    Option('NPROCS',        0,          'processes of main_multi_gpu.py; 0: one per visible GPU, one on CPU',
                                        ge=0, le=1024, flag=True, on_resume='unsaved'),
    Option('AMP',           False,      'mixed precision in training and evaluation (GPU only)', flag=True),
    Option('AMP_DTYPE',     'auto',     'float16 (with loss scaling), bfloat16, or auto: bfloat16 from '
                                        'compute capability 8.0 on', choices=('auto', 'float16', 'bfloat16')),
    Option('SEED',          0,          'decides initialisation, order and augmentation', ge=0),
    Option('EVAL',          False,      'only evaluate', flag=True, on_resume='unsaved'),
    Option('CHECK',         False,      'a dry run of some steps: memory, speed, and time and disk of '
                                        'the whole run',
                                        flag=True, on_resume='unsaved'),
    Option('CHECK_BATCH',   False,      'the same, and the largest DATA.BATCH_SIZE that fits, by trying',
                                        flag=True, on_resume='unsaved'),
    Option('RESULTS',       '',         "CSV that evaluations append to; '': results.csv in the run folder",
                                        path='FILE', flag=True, on_resume='unsaved'),
    Option('OUTPUT',        '',         "the run folder; '': a new one below SAVE",
                                        path='DIR', flag=True, on_resume='unsaved'),
    Option('SAVE',          './output', 'where run folders are made when OUTPUT is not given',
                                        path='DIR', on_resume='unsaved'),
    Option('SAVE_FREQ',     1,          'epochs between checkpoints', ge=1, on_resume='free'),
    Option('SAVE_STEPS',    0,          'optimizer steps between checkpoints within an epoch; 0: none',
                                        ge=0, on_resume='free'),
    Option('SAVE_MINUTES',  0.0,        'minutes between checkpoints within an epoch; 0: none',
                                        ge=0, on_resume='free'),
    Option('SAVE_KEEP',     3,          'newest checkpoints that are kept', ge=1, on_resume='free'),
    Option('REPORT_FREQ',   50,         'optimizer steps between log lines, counted within each epoch',
                                        ge=1, on_resume='free'),
    Option('VALIDATE_FREQ', 1,          'epochs between evaluations', ge=1, on_resume='free'),

    # ---- images, and how they are read
    Option('DATA.DATASET',         'imagenet2012', "has no effect; for the predecessor's commands",
                                             choices=('imagenet2012',), flag=True),
    Option('DATA.DATA_PATH',       './Light_ILSVRC2012',
                                             "folder or archive with train_list.txt and "
                                             "val_list.txt, whose lines are 'relative/path label'",
                                             path='DIR', flag=True, on_resume='free'),
    Option('DATA.EVAL_LIST',       'val_list.txt',
                                             'list file in that folder that is evaluated'),
    Option('DATA.EVAL_CLASSES',    '',       'text file: line i is the class of the model for label i of '
                                             'that list; the others are left out; see docs/evaluation.md',
                                             path='FILE'),
    Option('DATA.EVAL_LABELS',     '',       'JSON file: several right labels for each image of that list',
                                             path='FILE'),
    Option('DATA.BATCH_SIZE',      256,      'training images per process and forward pass',
                                             ge=1, flag=True, on_resume='product'),
    Option('DATA.BATCH_SIZE_EVAL', 0,        'evaluation images per process and pass; 0: as BATCH_SIZE',
                                             ge=0, flag=True, on_resume='free'),
    Option('DATA.IMAGE_SIZE',      256,      'side of the square input, or [height, width], pixels',
                                             is_size=True, ge=1, le=16384, flag=True),
    Option('DATA.CHANNELS',        3,        '3: RGB; 1: grey, made of any image; else as many as '
                                             'each file has, see docs/data.md', ge=1, le=1024),
    Option('DATA.CROP_PCT',        0.95,     'evaluation: side of centre crop over resized shorter side',
                                             gt=0, le=1),
    Option('DATA.MEAN',            [0.485, 0.456, 0.406], 'of each channel in [0, 1], or one for all',
                                             ge=0, le=1, hint=OF_PIXELS),
    Option('DATA.STD',             [0.229, 0.224, 0.225], 'of each channel in [0, 1], or one for all',
                                             gt=0, le=1, hint=OF_PIXELS),
    Option('DATA.NUM_WORKERS',     -1,       'data processes per training process; 0: none, it loads itself; '
                                             '-1: 2 on a CPU, by cores and GPUs on a GPU',
                                             ge=-1, le=1024, flag=True, on_resume='free'),
    Option('DATA.BACKEND',         'pillow', 'for training: pillow, or cv2 (OpenCV): faster, not equal; '
                                             'see docs/performance.md', choices=('pillow', 'cv2')),
    Option('DATA.BALANCE',         0.0,      '0: each image once an epoch; 1: each class as often',
                                             ge=0, le=1),
    Option('DATA.ON_ERROR',        'raise',  'unreadable image: raise (stop and name it), skip (count it)',
                                             choices=('raise', 'skip'), on_resume='free'),
    Option('DATA.BACKGROUND',      'white',  "colour behind transparent pixels: a name or '#rrggbb'; "
                                             "drop: ignore alpha, as timm does"),
    Option('DATA.MAX_PIXELS',      89478485, 'larger images are unreadable; this size takes up to 1 GB',
                                             ge=1, on_resume='free'),
    Option('DATA.TIMEOUT',         600,      'seconds that a data process may take for an image; 0: no limit',
                                             ge=0, on_resume='free'),

    # ---- the network
    Option('MODEL.NAME',             'halonet_26t', 'for logs and run folders', on_resume='free'),
    Option('MODEL.NUM_CLASSES',      1000,     '-1: as many as the data have; 0: no classifier (a backbone)',
                                               ge=-1),
    Option('MODEL.STEM',             'tiered', 'tiered (three 3x3), or one convolution: 7x7, 3x3',
                                               choices=('tiered', '7x7', '3x3')),
    Option('MODEL.STEM_WIDTH',       64,       'output channels of the stem', ge=8),
    Option('MODEL.STEM_POOL',        True,     '3x3 max pooling, stride 2, after the stem; without it '
                                               'a tiered stem ends with stride 2'),
    Option('MODEL.STAGES',           ['conv*2', 'conv*2', 'conv halo', 'halo*2'],
                                               'blocks by stage: conv, halo, bot or lambda; KIND*N repeats'),
    Option('MODEL.WIDTHS',           [256, 512, 1024, 2048], 'output channels of each stage', ge=1),
    Option('MODEL.STRIDES',          [1, 2, 2, 2], 'stride of the first block of each stage', ge=1),
    Option('MODEL.HEADS',            [0, 0, 8, 8],
                                               'attention heads of each stage; 0: it has no attention',
                                               ge=0),
    Option('MODEL.INNER_WIDTHS',     [],       'inner width of blocks by stage; []: from BOTTLENECK_RATIO',
                                               items=int, ge=1),
    Option('MODEL.BOTTLENECK_RATIO', 0.25,     'inner width of a block over its output width', gt=0),
    Option('MODEL.BOTTLENECK_IN',    False,    "BOTTLENECK_RATIO is over the block's input width instead"),
    Option('MODEL.GROUP_SIZE',       0,        'channels in each group of the 3x3 convolutions; 0: one group',
                                               ge=0),
    Option('MODEL.CHANNEL_ATTN',     'none',   'after 3x3 convolutions: none, se (squeeze-excite) or eca',
                                               choices=('none', 'se', 'eca')),
    Option('MODEL.SE_RATIO',         0.0625,   'se: inner over outer width', gt=0),
    Option('MODEL.PROJECTION',       True,     'a convolution as shortcut where stride or width change; '
                                               'False: no shortcut there'),
    Option('MODEL.LINEAR_OUT',       False,    'no activation at the end of a block'),
    Option('MODEL.BLOCK_SIZE',       8,        'side of a query block, in pixels of the feature map', ge=1),
    Option('MODEL.HALO_SIZE',        2,        'pixels around the block that its queries see as well', ge=0),
    Option('MODEL.WINDOW',           'block',  'what a query sees: the window of its block, the inside of '
                                               'the map in it, or what is within HALO_SIZE of the query',
                                               choices=('block', 'inside', 'query')),
    Option('MODEL.POSITIONS',        'relative', 'of halo attention: relative, none, or absolute (sines)',
                                               choices=('relative', 'none', 'absolute')),
    Option('MODEL.HALO_STRIDE',      'query',  'halo attention with a stride: query (every n-th pixel is '
                                               'one) or pool (the mean of all)', choices=('query', 'pool')),
    Option('MODEL.HEAD_DIM',         0,        'width of a query or key head; 0: from QK_RATIO (lambda: 16)',
                                               ge=0),
    Option('MODEL.QK_RATIO',         1.0,      'width of all queries over inner width, to a multiple of 8',
                                               gt=0),
    Option('MODEL.VALUE_RATIO',      1.0,      'halo: width of all values over the inner width', gt=0),
    Option('MODEL.LAMBDA_SIZE',      13,       'lambda: side of the square of positions around a pixel',
                                               ge=1),
    Option('MODEL.HEAD_WIDTH',       0,        'channels of a last 1x1 convolution, before pooling; 0: none',
                                               ge=0),
    Option('MODEL.ATTENTION',        'auto',   "auto, composed or sdpa (both of Paddle's operators) or fused "
                                               "(compiled; on a CPU also convolutions and norms)",
                                               choices=('auto', 'composed', 'sdpa', 'fused'),
                                               on_resume='free'),
    Option('MODEL.ACT',              'relu',   'relu or silu', choices=('relu', 'silu')),
    Option('MODEL.DROPOUT',          0.0,      'before the classifier', ge=0, lt=1),
    Option('MODEL.DROPPATH',         0.0,      'stochastic depth of the last block, rising linearly from 0',
                                               ge=0, lt=1),
    Option('MODEL.FREEZE',           0,        'parts to freeze, with norms: 1: stem, 2: also stage 1, ...',
                                               ge=0),
    Option('MODEL.FREEZE_NORM',      False,    'batch norms use and never update their running statistics'),

    # ---- the weights
    Option('MODEL.PRETRAINED',       '',       'weights to start from or to evaluate: a file, '
                                               'or a hub name such as timm/halonet26t.a1h_in1k',
                                               path='FILE', flag=True, on_resume='unsaved'),
    Option('MODEL.PRETRAINED_EMA',   False,    "take a training checkpoint's moving average of the weights",
                                               on_resume='unsaved'),
    Option('MODEL.RESUME',           '',       'a checkpoint to go on from; auto: the newest good one '
                                               'of the run folder, if any',
                                               path='FILE', flag=True, on_resume='unsaved'),
    Option('MODEL.RESUME_FORCE',     False,    'resume although options or images differ from before',
                                               on_resume='unsaved'),

    # ---- how long, and in what passes
    Option('TRAIN.NUM_EPOCHS',        300,      'passes over the training images', ge=1),
    Option('TRAIN.PATIENCE',          0,        'end after so many epochs without a better accuracy; 0: no',
                                                ge=0, on_resume='free'),
    Option('TRAIN.LAST_EPOCH',        -1,       'go on after this epoch (counted from 1), once in a run; '
                                                '-1: where the checkpoint is',
                                                ge=-1, flag=True, on_resume='unsaved'),
    Option('TRAIN.ACCUM_ITER',        1,        'forward passes per optimizer step',
                                                ge=1, flag=True, on_resume='product'),
    Option('TRAIN.GLOBAL_BATCH',      0,        'images per optimizer step; ACCUM_ITER follows '
                                                'from it and the processes; 0: not stated',
                                                ge=0, on_resume='product'),
    Option('TRAIN.RECOMPUTE',         0,        'first stages that compute activations twice to save memory',
                                                ge=0, on_resume='free'),
    Option('TRAIN.TO_STATIC',         False,    'trace forward and backward passes by paddle.jit.to_static',
                                                on_resume='free'),

    # ---- optimizer and learning rate
    Option('TRAIN.OPTIMIZER',         'adamw',  "adamw, sgd (Nesterov), lamb or rmsprop (TensorFlow's)",
                                                choices=('adamw', 'sgd', 'lamb', 'rmsprop')),
    Option('TRAIN.BASE_LR',           0.001,    'learning rate after warm-up, for LR_BATCH images in a step',
                                                ge=0),
    Option('TRAIN.LR_BATCH',          0,        'batch size of linear scaling; 0: BASE_LR is used as it is',
                                                ge=0),
    Option('TRAIN.LR_SCHEDULE',       'cosine', 'after warm-up: cosine, to END_LR, or step, '
                                                'times DECAY_RATE every DECAY_EPOCHS',
                                                choices=('cosine', 'step')),
    Option('TRAIN.DECAY_EPOCHS',      2.4,      'of the step schedule', gt=0),
    Option('TRAIN.DECAY_RATE',        0.97,     'of the step schedule', ge=0, le=1),
    Option('TRAIN.WARMUP_EPOCHS',     5.0,      'linear rise from WARMUP_LR, by the step', ge=0),
    Option('TRAIN.WARMUP_LR',         1e-6,     'learning rate of the first step (not scaled)', ge=0),
    Option('TRAIN.END_LR',            1e-6,     'learning rate of the last step, and the lowest (not scaled)',
                                                ge=0),
    Option('TRAIN.COOLDOWN_EPOCHS',   0.0,      'epochs with END_LR at the end, part of NUM_EPOCHS', ge=0),
    Option('TRAIN.LAYER_DECAY',       1.0,      'learning rate of a block over that of the block above it',
                                                ge=0, le=1),
    Option('TRAIN.WEIGHT_DECAY',      0.05,     'of matrices and kernels; not norms, biases, position tables',
                                                ge=0),
    Option('TRAIN.BETAS',             [0.9, 0.999], 'adamw, lamb', length=2, ge=0, lt=1),
    Option('TRAIN.EPS',               1e-8,     'adamw, lamb, rmsprop', gt=0),
    Option('TRAIN.MOMENTUM',          0.9,      'sgd, rmsprop', ge=0, lt=1),
    Option('TRAIN.RMSPROP_ALPHA',     0.9,      "decay of rmsprop's mean square", ge=0, le=1),
    Option('TRAIN.GRAD_CLIP',         0.0,      'limit of the gradients, as CLIP_MODE says; 0: off', ge=0),
    Option('TRAIN.CLIP_MODE',         'norm',   'norm of all together, value of each number, '
                                                'or agc: a fraction of the weights (0.01)',
                                                choices=('norm', 'value', 'agc')),

    # ---- loss, and averages
    Option('TRAIN.LOSS',              'ce',     'ce (cross-entropy) or bce (binary, of each class)',
                                                choices=('ce', 'bce')),
    Option('TRAIN.BCE_THRESHOLD',     -1.0,     'bce: targets above it are 1, others 0; below 0: stay soft',
                                                ge=-1, lt=1),
    Option('TRAIN.CLASS_WEIGHTS',     0.0,      'of the loss, images of the class ** -CLASS_WEIGHTS; 0: all '
                                                'alike, 1: the inverse', ge=0, le=1),
    Option('TRAIN.SMOOTHING',         0.1,      'label smoothing', ge=0, lt=1),
    Option('TRAIN.EMA_DECAY',         0.0,      'moving average of the weights: decay per step; 0: off',
                                                ge=0, lt=1),
    Option('TRAIN.EMA_WARMUP',        0.0,      'its warm-up: decay at most 1 - (1 + step) ** -this; 0: none',
                                                ge=0),
    Option('TRAIN.SYNC_BN',           False,    'batch norms see the images of all processes (GPU only)'),

    # ---- augmentation
    Option('TRAIN.AUG_REPEATS',       1,        'copies of an image in an epoch of the same length, '
                                                'each with its own augmentation', ge=1),
    Option('TRAIN.CROP_SCALE',        [0.08, 1.0], 'random resized crop: fraction of the area',
                                                length=2, gt=0, le=1),
    Option('TRAIN.CROP_RATIO',        [0.75, 4.0 / 3.0], 'random resized crop: width over height',
                                                length=2, gt=0),
    Option('TRAIN.HFLIP',             0.5,      'probability of a mirrored image', ge=0, le=1),
    Option('TRAIN.AUTO_AUGMENT',      '',       "timm's grammar, such as rand-m9-mstd0.5-inc1; '': off"),
    Option('TRAIN.COLOR_JITTER',      0.0,      'without AUTO_AUGMENT: brightness, contrast and saturation '
                                                'factors in 1 +- this', ge=0),
    Option('TRAIN.RANDOM_ERASE_PROB', 0.0,      'probability of erasing a rectangle', ge=0, le=1),
    Option('TRAIN.RANDOM_ERASE_MODE', 'pixel',  'pixel (normal noise) or const (the mean colour)',
                                                choices=('pixel', 'const')),
    Option('TRAIN.MIXUP_ALPHA',       0.0,      'Beta parameter of mixup; 0: off', ge=0),
    Option('TRAIN.CUTMIX_ALPHA',      0.0,      'Beta parameter of cutmix; 0: off', ge=0),
    Option('TRAIN.MIXUP_MODE',        'batch',  'what is mixed alike: batch, pair, elem or half '
                                                '(a pair, of which one image is kept)',
                                                choices=('batch', 'pair', 'elem', 'half')),
    Option('TRAIN.MIXUP_PROB',        1.0,      'probability of mixing a batch, pair or elem', ge=0, le=1),
    Option('TRAIN.MIXUP_SWITCH_PROB', 0.5,      'probability of cutmix where both are on', ge=0, le=1),
)


# ---- relations between options: what must hold, and what to do where it does not

def is_color(text: str) -> bool:
    """True for a colour that Pillow knows, without transparency, and for drop."""
    if text == 'drop':
        return True
    try:
        return len(ImageColor.getrgb(text)) == 3
    except ValueError:
        return False


def one_per_channel(values: list, channels: int) -> bool:
    return len(values) in (1, channels)


def one_per_stage(values: list, stages: list) -> bool:
    return len(values) == len(stages)


RELATIONS = (
    Relation('DATA.BACKGROUND', is_color, "it can be a colour such as white or '#808080', or drop"),
    Relation('DATA.MEAN DATA.CHANNELS', one_per_channel,
             'give one number for each channel, or one for all, such as [0.449]'),
    Relation('DATA.STD DATA.CHANNELS', one_per_channel,
             'give one number for each channel, or one for all, such as [0.226]'),
    Relation('DATA.BACKEND DATA.CHANNELS', lambda backend, channels: backend == 'pillow' or channels == 3,
             'OpenCV makes RGB images only here; leave DATA.BACKEND pillow'),
    Relation('TRAIN.CROP_SCALE', lambda scale: scale[0] <= scale[1], 'it must be [smallest, largest]'),
    Relation('TRAIN.CROP_RATIO', lambda ratio: ratio[0] <= ratio[1], 'it must be [smallest, largest]'),
    Relation('MODEL.STAGES', lambda stages: len(stages) > 0, 'a network needs at least one stage'),
    Relation('MODEL.WIDTHS MODEL.STAGES', one_per_stage, 'give one number for each stage'),
    Relation('MODEL.STRIDES MODEL.STAGES', one_per_stage, 'give one number for each stage'),
    Relation('MODEL.HEADS MODEL.STAGES', one_per_stage, 'give one number for each stage'),
    Relation('MODEL.INNER_WIDTHS MODEL.STAGES',
             lambda widths, stages: widths == [] or one_per_stage(widths, stages),
             'give one number for each stage, or []'),
    Relation('MODEL.LAMBDA_SIZE', lambda size: size % 2 == 1,
             'it must be an odd number, to have a middle'),
    Relation('MODEL.FREEZE MODEL.STAGES', lambda parts, stages: parts <= len(stages) + 1,
             'MODEL.FREEZE can be at most the number of stages, and 1 for the stem'),
    Relation('TRAIN.RECOMPUTE MODEL.STAGES', lambda recomputed, stages: recomputed <= len(stages),
             'TRAIN.RECOMPUTE can be at most the number of stages'),
    Relation('TRAIN.RECOMPUTE TRAIN.TO_STATIC', lambda recomputed, static: not (recomputed and static),
             'recomputing works in eager mode only; leave it 0, or TRAIN.TO_STATIC False'),
    Relation('TRAIN.GLOBAL_BATCH TRAIN.ACCUM_ITER', lambda images, passes: not images or passes == 1,
             'the passes follow from the images per step; leave TRAIN.GLOBAL_BATCH 0, or TRAIN.ACCUM_ITER 1'),
    Relation('DATA.BALANCE TRAIN.AUG_REPEATS', lambda balance, repeats: not balance or repeats == 1,
             'a balanced order has copies of its own; leave DATA.BALANCE 0, or TRAIN.AUG_REPEATS 1'),
    Relation('TRAIN.WARMUP_EPOCHS TRAIN.COOLDOWN_EPOCHS TRAIN.NUM_EPOCHS',
             lambda warmup, cooldown, epochs: warmup + cooldown < epochs,
             'no epoch is left between warm-up and cool-down; shorten them or raise TRAIN.NUM_EPOCHS'),
    Relation('TRAIN.LAST_EPOCH TRAIN.NUM_EPOCHS', lambda last, epochs: last <= epochs,
             'no epoch would be left to train; lower the first or raise the second'),
)
TABLE = Table(OPTIONS, RELATIONS)
OF_ONE_START = tuple(option.key for option in OPTIONS if option.on_resume == 'unsaved')
FREE_ON_RESUME = frozenset(option.key for option in OPTIONS if option.on_resume != 'fixed')
CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configs')


def defaults() -> dict[str, Any]:
    """Return {'GROUP.KEY': default} of every option."""
    return TABLE.defaults()


# ---- a config, from files and options

def get_config(cfg_file: str | os.PathLike | None = None, opts: Iterable = ()) -> CfgNode:
    """Return the defaults, changed by `cfg_file` with its BASE files and by `opts`; checked and frozen.

    `opts` is [KEY, VALUE, KEY, VALUE, ...]. Raises ValueError for an unknown key, for a value of another
    type or outside its limits, and FileNotFoundError.
    """
    values = defaults()
    if cfg_file:
        files = ConfigFiles(TABLE, identity='MODEL.NAME', clean=_leave_out_an_old_start)
        settings = files.read(find_config(cfg_file))
        values.update({key: setting.value for key, setting in settings.items()})
    opts = list(opts)
    if len(opts) % 2:
        raise ValueError(f'-opts takes pairs KEY VALUE; {opts[-1]!r} has no value')
    for key, value in zip(opts[::2], opts[1::2]):
        if key == 'BASE':
            raise ValueError('command line: BASE has a meaning in config files only')
        values[key] = TABLE.parse(key, value, 'command line')
    for option in OPTIONS:
        if option.path:
            values[option.key] = option.expand_home(values[option.key])
    _choose_weights(values, explicit=opts[::2])
    TABLE.check(values)
    return tree(values)


def find_config(name: str | os.PathLike) -> str:
    """Return the path of a config file, which is `name`, or is called so in configs/, as halonet_26t is.

    Raises FileNotFoundError.
    """
    return find_file(name, CONFIGS)


def changed(config: CfgNode, key: str, value: Any) -> CfgNode:
    """Return a frozen copy of a config in which the option `key` has another value."""
    return tree({**flatten(config.clone()), key: value})


def dump_run(config: CfgNode) -> str:
    """Return the text of RUN/config.yaml, or of an evaluation's config_eval.yaml, without OF_ONE_START.

    An evaluation keeps EVAL, so that nobody starts a training with its file by mistake.
    """
    values = flatten(config)
    for key in OF_ONE_START:
        if key != 'EVAL' or not config.EVAL:
            del values[key]
    return tree(values).dump()


# ---- the command line

def parse_args(argv: Sequence[str] | None = None) -> CfgNode:
    """Return the config of a command line (default: sys.argv). A mistake is one line and exit code 2."""
    console.prepare()
    parser = Parser(description='Train or evaluate a HaloNet.')
    parser.elsewhere = {option.name: f'-opts {option.key}' for option in OPTIONS}
    parser.add('cfg', 'config file, or the name of one in configs/, such as halonet_26t', metavar='FILE')
    for option in OPTIONS:
        if option.flag:
            _add_flag(parser, option)
    parser.add('ngpus', argparse.SUPPRESS, dest='NPROCS')       # its name in PaddleViT's first version
    parser.add('opts', 'any other option of config.py', nargs='+', action='extend', default=[],
               metavar='KEY VALUE')
    args = vars(parser.parse_args(argv))
    cfg_file, opts = args.pop('cfg'), args.pop('opts')
    flags = {key: value for key, value in args.items() if value is not None}
    try:
        return get_config(cfg_file, with_opts(flags, opts))
    except (ValueError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')


def _add_flag(parser: Parser, option: Option) -> None:
    """Add the flag of an option, whose value `get_config` parses and checks."""
    if isinstance(option.default, bool):
        parser.add(option.name, option.comment, dest=option.key, action='store_const', const=True)
    else:
        metavar = option.path or ('NAME' if option.choices else 'N')
        parser.add(option.name, option.comment, dest=option.key, metavar=metavar)


def with_opts(flags: Mapping[str, Any], opts: Sequence) -> list:
    """Return flags, {KEY: value}, and the words KEY VALUE ... after -opts as the `opts` of get_config.

    Raises ValueError for an option that both give, with different values: neither is clearly meant.
    """
    for key, value in zip(opts[::2], opts[1::2]):
        if key not in flags:
            continue
        by_flag = TABLE.parse(key, flags[key], 'command line')
        by_opts = TABLE.parse(key, value, 'command line')
        if by_flag != by_opts:
            name = TABLE.options[key].name
            raise ValueError(f'-{name} says {by_flag!r} and -opts {key} says {by_opts!r}, '
                             'of the same option; leave one out')
    return [item for pair in flags.items() for item in pair] + list(opts)


# ---- steps of get_config

def _choose_weights(values: dict[str, Any], explicit: Sequence) -> None:
    """Let the command line, whose keys are `explicit`, decide between MODEL.PRETRAINED and MODEL.RESUME.

    Raises ValueError where neither or both of the two are explicit. A training may have both with RESUME
    auto: it starts from PRETRAINED if its run folder holds no checkpoint.
    """
    pretrained, resume = values['MODEL.PRETRAINED'], values['MODEL.RESUME']
    start_or_go_on = resume == 'auto' and not values['EVAL']
    if not pretrained or not resume or start_or_go_on:
        return
    if 'MODEL.PRETRAINED' in explicit and 'MODEL.RESUME' not in explicit:
        values['MODEL.RESUME'] = ''
    elif 'MODEL.RESUME' in explicit and 'MODEL.PRETRAINED' not in explicit:
        values['MODEL.PRETRAINED'] = ''
    else:
        hint = '' if values['EVAL'] else ' (-resume auto uses -pretrained if there is no checkpoint yet)'
        raise ValueError(f'-pretrained {pretrained} and -resume {resume} name different weights; '
                         f'leave one of them out{hint}')


# Earlier versions wrote all options into RUN/config.yaml, also these. No later file holds all of them.
ONLY_IN_OLD_FILES = {'BASE', 'DEVICE', 'NPROCS', 'EVAL', 'OUTPUT', 'SAVE', 'MODEL.PRETRAINED',
                     'MODEL.RESUME', 'TRAIN.LAST_EPOCH'}
WEIGHTS_OF_ONE_START = ('MODEL.PRETRAINED', 'MODEL.PRETRAINED_EMA', 'MODEL.RESUME', 'MODEL.RESUME_FORCE',
                        'TRAIN.LAST_EPOCH')


def _leave_out_an_old_start(content: dict[str, Any], path: str) -> None:
    """Remove the options that say which weights a start used from a file that an earlier version wrote.

    Files that people write state only some of the options, and keep these.
    """
    if not ONLY_IN_OLD_FILES <= content.keys():
        return
    for key in WEIGHTS_OF_ONE_START:
        default = TABLE.options[key].default
        value = content.pop(key, default)
        if value != default:
            logging.getLogger('halonet').warning(
                '%s: %s %s belongs to the start that wrote this file, and is ignored', path, key, value)
