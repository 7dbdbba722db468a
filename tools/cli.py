"""What the tools share: the options that name a model, its loading, class names, safe files, a progress line.

Paddle is imported where it is needed, not above: help and mistakes answer at once, and some tools do without it.
"""
import argparse
import errno
import os
import subprocess
import sys
import time
from typing import Any, Optional

from system import command_line, console, files, lifeline, packages  # noqa: F401  packages reports a missing one

import config as options
from data import class_names
from data.class_names import imagenet_classes, read_names  # noqa: F401  for the tools

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INTERRUPTED = 130                                   # exit status after Ctrl-C


# ---- the command line

class Parser(command_line.Parser):
    """Options with one dash or two, as the main programs have them; the description ends with examples."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(self, name, help, **kwargs):
        default = kwargs.get('default')
        if 'default:' not in help and type(default) in (int, float):
            help = f'{help} (default: {default})'
        super().add(name, help, **kwargs)

    def add_model(self):
        """The options that `config_of` reads."""
        self.add('cfg', 'config file of the model (default: the config.yaml beside the weights)', metavar='FILE')
        self.add('pretrained', 'weights', metavar='FILE', required=True)
        self.add('image_size', 'side of the square input, pixels (default: as the config says)', metavar='N')
        self.add('crop_pct', 'side of the centre crop over the resized shorter side (default: as the config says)', metavar='X')
        self.add('device', 'auto, gpu or cpu')
        self.add('classes', "class names, one per line in the labels' order (default: the class_names.txt beside the weights, "
                 "else the names of DATA.DATA_PATH, else ImageNet's for 1000 classes)", metavar='FILE')
        self.add('opts', 'any options of config.py', nargs='+', action='extend', default=[], metavar='KEY VALUE')

    def run(self, main, argv=None):
        """Call `main` on the parsed arguments and leave with its exit status; the user's mistakes are one line, status 2."""
        console.prepare()
        args = self.parse_args(argv)
        for name, value in vars(args).items():
            setattr(args, name, expand_home(value))
        try:
            status = main(args)
            sys.stdout.flush()
        except BrokenPipeError:                     # what reads the output, such as head, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 0
        except (ValueError, OSError) as error:
            self.exit(2, f'{self.prog}: error: {told(error)}\n')
        except KeyboardInterrupt:
            self.exit(INTERRUPTED, '\ninterrupted\n')
        sys.exit(status)


def expand_home(value: Any) -> Any:
    """Replace a ~ at the start of a path, or of each path of a list, by the home folder: -html=~/x.html."""
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def told(error):
    """What is wrong, in words; the system's errors as 'file: what'."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    return str(error)


def config_of(args):
    """The config that the options of Parser.add_model name. Raises as config.get_config."""
    path = args.cfg or os.path.join(os.path.dirname(args.pretrained), 'config.yaml')
    if not args.cfg and not os.path.isfile(path):
        raise ValueError(f'there is no {path} that says what model {args.pretrained} belongs to; give its config by -cfg FILE')
    flags = {'MODEL.PRETRAINED': args.pretrained, 'DATA.IMAGE_SIZE': args.image_size, 'DATA.CROP_PCT': args.crop_pct,
             'DEVICE': args.device}
    given = {key: value for key, value in flags.items() if value is not None}
    return options.get_config(path, options.with_opts(given, args.opts))


def load_model(config):
    """The HaloNet of a config with the weights of MODEL.PRETRAINED, for evaluation, on the chosen device; and that device."""
    import utils

    from halonet import build_halonet
    from training.restoring import load_weights
    device = utils.start(config.DEVICE)
    model = build_halonet(config)
    load_weights(model, config.MODEL.PRETRAINED, ema=config.MODEL.PRETRAINED_EMA, options=options.flatten(config))
    model.eval()
    return model, device


# ---- class names

def find_class_names(config: Any, path: Optional[str] = None) -> Optional[list[str]]:
    """Return the class names of a config's weights, or None; `path` is the file of -classes.

    Raises as class_names.find, whose warnings go to the standard error.
    """
    def warn(text):
        print(f'warning: {text}; -classes FILE gives others', file=sys.stderr)
    return class_names.find(
        config.MODEL.NUM_CLASSES, file=path, run_folder=class_names.run_folder_of(config.MODEL.PRETRAINED),
        data_path=config.DATA.DATA_PATH, warn=warn)


def class_names_or_numbers(config: Any, path: Optional[str] = None) -> list[str]:
    """Return the class names as `find_class_names` does, or else 'class 0', 'class 1' and so on."""
    return find_class_names(config, path) or class_names.numbered(config.MODEL.NUM_CLASSES)


def run_program(command: list[str]) -> subprocess.CompletedProcess:
    """Run a program that ends with this process, however that ends; its `stdout` has the text of both its outputs."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace',
                          preexec_fn=lifeline.die_with_parent)


# ---- files

def check_outputs(*paths):
    """Raise OSError for a file that cannot be written, before there is work to lose; None, '' and '-' are fine."""
    for path in paths:
        if path and path != '-':
            folder = os.path.dirname(path) or '.'
            number = (errno.EISDIR if os.path.isdir(path) else errno.ENOENT if not os.path.isdir(folder) else
                      errno.EACCES if not os.access(path if os.path.exists(path) else folder, os.W_OK) else 0)
            if number:
                raise OSError(number, f'cannot be written: {os.strerror(number)}', path)


def write_text(path, text):
    """Make the file `path`: the whole of it, or none. '-' is the standard output."""
    if path == '-':
        sys.stdout.write(text)
        return
    files.atomic_write(path, lambda file: file.write(text.encode('utf-8', 'backslashreplace')))


def progress(items, total, what):
    """Yield the items, with a line on the terminal that says how far it is; elsewhere silent."""
    start, said = time.monotonic(), 0.0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if sys.stderr.isatty() and (now - said > 0.2 or done == total):
            said, rate = now, done / max(now - start, 1e-9)
            bar, left = '#' * (30 * done // total), (total - done) / rate
            print(f'\r{what} [{bar:30}] {done}/{total}  {rate:.0f}/s  {left:.0f} s left ', end='', file=sys.stderr)
    if said:
        print(file=sys.stderr)
