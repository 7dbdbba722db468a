"""Send the records of a run to a tracker, while it trains or afterwards. The training does not know of it.

RUN is a run folder. Its metrics.jsonl is read until the run has ended, which final.pdparams tells; a run that
is stopped and resumed is followed further. RUN/follow_TRACKER.json keeps the place, so that the same command
goes on behind what it has sent. A value is sent once, named SPLIT/KEY, such as val/acc1.

  python tools/follow.py runs/26t -to swanlab
  python tools/follow.py runs/26t -to wandb -project halonet -name first -once
  python tools/follow.py runs/26t -to tensorboard -output logs/26t

The packages swanlab and wandb are not among the requirements. Their own settings hold, such as
WANDB_MODE=offline and SWANLAB_MODE=offline. Every run folder has tensorboard/ anyway; -output is for a copy.

Exit status: 0, or 2 for a mistake in the command or a tracker that fails, or 130 after Ctrl-C.
"""
import argparse
import importlib
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli

from config import flatten, get_config
from reporting.event_file import SCALARS, EventFile

TRACKERS = ('tensorboard', 'swanlab', 'wandb')
POLL = 2.0                                          # seconds between looks at the file
ID_LENGTH = 21                                      # swanlab takes no other


class Record(NamedTuple):
    """The values of a step of a split."""

    split: str
    step: int
    values: dict[str, float]


# ---- the run

def read_records(path: str) -> list[Record]:
    """Read the complete records of metrics.jsonl, in their order. A missing file has none.

    Raises ValueError, with the line, for one that is no record.
    """
    records: list[Record] = []
    if not os.path.exists(path):
        return records
    with open(path, encoding='utf-8') as file:
        for number, line in enumerate(file, 1):
            if not line.endswith('\n'):             # still being written
                break
            try:
                content = json.loads(line)
                split, step = content['split'], content['step']
            except (ValueError, TypeError, KeyError):
                raise ValueError(f'{path}:{number}: not a record of a run') from None
            values = {key: content[key] for key in SCALARS if content.get(key) is not None}
            records.append(Record(split, step, values))
    return records


def has_ended(folder: str) -> bool:
    """True if final weights were written after the last record."""
    final, metrics = os.path.join(folder, 'final.pdparams'), os.path.join(folder, 'metrics.jsonl')
    if not os.path.exists(final) or not os.path.exists(metrics):
        return False
    return os.path.getmtime(final) >= os.path.getmtime(metrics)


def follow(folder: str, sent: dict[str, int], once: bool) -> Iterator[Record]:
    """Yield the records behind the steps of `sent`, {split: last step}, until the run has ended.

    A resumed run writes some records again, which are left out. With `once`, yields what is there now.
    The caller keeps `sent` up to date.
    """
    path = os.path.join(folder, 'metrics.jsonl')
    while True:
        ended = once or has_ended(folder)           # before reading: a record may come between
        for record in read_records(path):
            if record.step > sent.get(record.split, 0):
                yield record
        if ended:
            return
        time.sleep(POLL)


# ---- trackers

class TensorBoard:
    """Writes event files into a folder, where each split is a run of its own."""

    def __init__(self, folder: str, sent: dict[str, int]) -> None:
        self.folder, self.sent = folder, dict(sent)
        self.files: dict[str, EventFile] = {}

    def log(self, record: Record) -> None:
        """Write a record."""
        if record.split not in self.files:
            first = self.sent.get(record.split, 0) + 1
            self.files[record.split] = EventFile(os.path.join(self.folder, record.split), first)
        self.files[record.split].add(record.step, record.values)

    def finish(self) -> None:
        """Do nothing: every record is on the disk."""


class Service:
    """Sends records by swanlab or wandb, whose functions have the same names. `run_id` continues a run."""

    def __init__(self, module: Any, run_id: str, **options: Any) -> None:
        self.module = module
        module.init(id=run_id, resume='allow', **options)

    def log(self, record: Record) -> None:
        """Send a record."""
        values = {f'{record.split}/{key}': value for key, value in record.values.items()}
        self.module.log(values, step=record.step)

    def finish(self) -> None:
        """Send what is left, and end."""
        self.module.finish()


def import_tracker(name: str) -> Any:
    """Import the package of a tracker. Raises ValueError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(f'the package {name} is missing in {sys.executable}; install it by '
                         f'{sys.executable} -m pip install {name}') from None


# ---- the command

def parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument('run', metavar='RUN', help='run folder')
    parser.add('to', 'tensorboard, swanlab or wandb', choices=TRACKERS, required=True)
    parser.add('once', 'send what is there now, and end', action='store_true')
    parser.add('project', 'project of the tracker (default: halonet)', default='halonet', metavar='NAME')
    parser.add('name', "name of the run there (default: the run folder's)", metavar='NAME')
    parser.add('output', 'folder of the event files; for tensorboard only', metavar='DIR')
    return parser


def start(args: argparse.Namespace, run_id: str, sent: dict[str, int]) -> Any:
    """Start the tracker of the command. Raises ValueError."""
    if args.to == 'tensorboard':
        if not args.output:
            raise ValueError('-to tensorboard needs -output DIR; RUN/tensorboard has the same curves already')
        return TensorBoard(args.output, sent)
    module = import_tracker(args.to)
    name = args.name or os.path.basename(os.path.abspath(args.run))
    path = os.path.join(args.run, 'config.yaml')
    config = flatten(get_config(path)) if os.path.exists(path) else {}
    return Service(module, run_id, project=args.project, name=name, config=config)


def read_place(path: str) -> dict[str, Any]:
    """Return {'id': of the tracker's run, 'sent': {split: last step}}, for a missing file new ones.

    Raises ValueError for another content.
    """
    if not os.path.exists(path):
        return {'id': uuid.uuid4().hex[:ID_LENGTH], 'sent': {}}
    with open(path, encoding='utf-8') as file:
        try:
            state = json.load(file)
            sent = {str(split): int(step) for split, step in state['sent'].items()}
            return {'id': str(state['id']), 'sent': sent}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f'{path}: not the place of a follower; remove it to send all again') from None


def main(args: argparse.Namespace) -> int:
    if not os.path.isdir(args.run):
        raise ValueError(f'{args.run}: no such folder')
    place = os.path.join(args.run, f'follow_{args.to}.json')
    state = read_place(place)
    cli.write_json(place, state)                    # before the first record: an unwritable folder ends here
    count = 0
    try:
        tracker = start(args, state['id'], state['sent'])
        try:
            for record in follow(args.run, state['sent'], args.once):
                tracker.log(record)
                state['sent'][record.split] = record.step
                cli.write_json(place, state)
                count += 1
        finally:
            tracker.finish()
    except (ValueError, OSError):
        raise
    except Exception as error:                      # each tracker has errors of its own
        raise ValueError(f'{args.to}: {type(error).__name__}: {error}; {count} records were sent, the same '
                         'command goes on behind them') from error
    print(f'{count} records sent to {args.to}')
    return 0


if __name__ == '__main__':
    parser().run(main)
