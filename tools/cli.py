"""Parse options, load models, find class names, write files and show progress, for all tools.

Paddle is imported inside the functions that need it: help and wrong options are answered at once.
"""
import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any, Callable, NoReturn, Optional

from system import (
    command_line,
    console,
    files,
    lifeline,
    packages,  # noqa: F401  it reports a missing package
)

from tqdm import tqdm

import config as options
from data import class_names

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INTERRUPTED = 130                                   # exit status after Ctrl-C


# ---- the command line

class Parser(command_line.Parser):
    """A parser of options with one dash or two; `description` ends with examples."""

    def __init__(self, description: Optional[str]) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(self, name: str, help: str, **kwargs: Any) -> None:
        """Add an option; its help shows a default that is a number."""
        default = kwargs.get('default')
        if 'default:' not in help and type(default) in (int, float):
            help = f'{help} (default: {default})'
        super().add(name, help, **kwargs)

    def add_model(self) -> None:
        """Add the options that `config_of` reads."""
        self.add('cfg', 'config file of the model (default: the config.yaml beside the weights)',
                 metavar='FILE')
        self.add('pretrained', 'weights', metavar='FILE', required=True)
        self.add('image_size', 'side of the square input, or HEIGHTxWIDTH such as 128x256, pixels '
                 '(default: of the config)', metavar='N')
        self.add('crop_pct', 'side of the centre crop over the resized shorter side '
                 '(default: of the config)', metavar='X')
        self.add('device', 'auto, cpu, gpu, gpu:1, or another device of Paddle')
        self.add('classes', "class names, one per line in the labels' order (default: the class_names.txt "
                 "beside the weights, else the names of DATA.DATA_PATH, else ImageNet's for 1000 classes)",
                 metavar='FILE')
        self.add('opts', 'any options of config.py', nargs='+', action='extend', default=[],
                 metavar='KEY VALUE')

    def run(self, main: Callable[[argparse.Namespace], int], argv: Optional[list[str]] = None) -> NoReturn:
        """Call `main` on the parsed arguments and exit with its status.

        A ValueError or OSError of `main` is printed as one line, with exit status 2.
        """
        console.prepare()
        args = self.parse_args(argv)
        for name, value in vars(args).items():
            setattr(args, name, expand_home(value))
        try:
            status = main(args)
            sys.stdout.flush()
        except BrokenPipeError:                     # the reader of the output has ended, such as head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 0
        except (ValueError, OSError) as error:
            self.exit(2, f'{self.prog}: error: {describe_error(error)}\n')
        except KeyboardInterrupt:
            self.exit(INTERRUPTED, '\ninterrupted\n')
        sys.exit(status)


def expand_home(value: Any) -> Any:
    """Replace ~ by the home folder at the start of a path, or of each path of a list: -html=~/x.html."""
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def describe_error(error: Exception) -> str:
    """Return the message of an error; for an OSError 'file: reason'."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    return str(error)


def config_of(args: argparse.Namespace) -> Any:
    """Return the config that the options of Parser.add_model select. Raises as config.get_config."""
    path = args.cfg or os.path.join(os.path.dirname(args.pretrained), 'config.yaml')
    if not args.cfg and not os.path.isfile(path):
        raise ValueError(f'there is no {path} that describes the model of {args.pretrained}; '
                         'give its config by -cfg FILE')
    flags = {
        'MODEL.PRETRAINED': args.pretrained,
        'DATA.IMAGE_SIZE': args.image_size,
        'DATA.CROP_PCT': args.crop_pct,
        'DEVICE': args.device,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    return options.get_config(path, options.with_opts(given, args.opts))


def load_model(config: Any) -> tuple[Any, str]:
    """Build the HaloNet of a config for evaluation, with its weights; return it and its device."""
    import utils

    from halonet import build_halonet
    from training.restoring import load_weights
    device = utils.start(config.DEVICE)
    model = build_halonet(config)
    load_weights(model, config.MODEL.PRETRAINED, ema=config.MODEL.PRETRAINED_EMA,
                 options=options.flatten(config))
    model.eval()
    return model, device


# ---- class names

def find_class_names(config: Any, path: Optional[str] = None) -> Optional[list[str]]:
    """Return the class names of a config's weights, or None; `path` is the file of -classes.

    Raises as class_names.find. Its warnings go to the standard error.
    """
    def warn(text: str) -> None:
        print(f'warning: {text}; -classes FILE gives others', file=sys.stderr)
    return class_names.find(
        config.MODEL.NUM_CLASSES, file=path, run_folder=class_names.run_folder_of(config.MODEL.PRETRAINED),
        data_path=config.DATA.DATA_PATH, warn=warn)


def class_names_or_numbers(config: Any, path: Optional[str] = None) -> list[str]:
    """Return the class names as `find_class_names` does, or else 'class 0', 'class 1' and so on."""
    return find_class_names(config, path) or class_names.numbered(config.MODEL.NUM_CLASSES)


def run_program(command: list[str]) -> subprocess.CompletedProcess:
    """Run a program, which ends when this process ends; `stdout` of the result has both its outputs."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors='replace', preexec_fn=lifeline.die_with_parent)


# ---- files

def check_outputs(*paths: Optional[str]) -> None:
    """Raise OSError for a path that cannot be written. None, '' and '-' (the console) are skipped."""
    for path in paths:
        if path and path != '-':
            number = _obstacle(path)
            if number:
                raise OSError(number, f'cannot be written: {os.strerror(number)}', path)


def _obstacle(path: str) -> int:
    """Return the errno with which writing a file would fail, or 0."""
    folder = os.path.dirname(path) or '.'
    if os.path.isdir(path):
        return errno.EISDIR
    if not os.path.isdir(folder):
        return errno.ENOENT
    changed = path if os.path.exists(path) else folder
    return 0 if os.access(changed, os.W_OK) else errno.EACCES


def write_text(path: str, text: str) -> None:
    """Write the file `path`, as a whole or not at all. '-' is the standard output."""
    if path == '-':
        sys.stdout.write(text)
        return
    files.atomic_write(path, lambda file: file.write(text.encode('utf-8', 'backslashreplace')))


def write_json(path: str, content: Any) -> None:
    """Write a JSON file for people and programs, as `write_text` does."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + '\n')


def check_new_folder(path: str) -> None:
    """Raise ValueError for a folder to make that exists, unless it is empty."""
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise ValueError(f'{path} exists and is not an empty folder; choose another')


def move_content(folder: str, target: str) -> None:
    """Move the files of `folder` to the folder `target`, all at once."""
    ready = os.path.join(folder, 'ready')
    names = os.listdir(folder)
    os.mkdir(ready)
    for name in names:
        shutil.move(os.path.join(folder, name), ready)
    os.replace(ready, target)


# ---- progress

class _Bar(tqdm):
    monitor_interval = 0                            # no thread, because data processes are forked


def progress(items: Iterable, total: int, description: str) -> Iterable:
    """Yield the items, with tqdm's progress bar if the standard error is a terminal."""
    return _Bar(items, total=total, desc=description, disable=None, dynamic_ncols=True)
