"""Call tools in this process, and make weights for them."""
import os
from pathlib import Path
from typing import Any, NamedTuple

import paddle
import pytest
from runs import TINY, make_images

from config import get_config
from data import class_names
from data.list_file import read_list
from halonet import build_halonet

NAMES = ['red <b>', 'green', 'blue "&"', 'grey']    # of the classes


def call(tool, *words):
    """Run a tool with these words; return its exit status."""
    with pytest.raises(SystemExit) as stop:
        tool.parser().run(tool.main, [str(word) for word in words])
    return stop.value.code


def entries(folder, part):
    """Return the (path, label) pairs of a list in a folder, as training reads it."""
    classes = len(class_names.read_names(folder / 'class_names.txt'))
    samples = read_list(str(folder / f'{part}_list.txt'), str(folder), classes)
    return [(samples.name(i), int(samples.labels[i])) for i in range(len(samples))]


class Untrained(NamedTuple):
    """A folder with run/ (config.yaml, final.pdparams) and data/ (images, lists, class_names.txt)."""
    folder: Path
    model: Any
    config: Any

    @property
    def data(self):
        return self.folder / 'data'

    @property
    def weights(self):
        return self.folder / 'run' / 'final.pdparams'


def make_untrained(folder):
    """Write an untrained model, whose predictions differ clearly, and images for it."""
    data = make_images(folder / 'data', val=9)
    (folder / 'data' / 'class_names.txt').write_text(''.join(f'{name}\n' for name in NAMES))
    (folder / 'binary.txt').write_bytes(b'\x89PNG')
    os.makedirs(folder / 'run')
    config = get_config(None, [*TINY, 'DATA.DATA_PATH', data, 'DATA.CROP_PCT', 0.8])
    (folder / 'run' / 'config.yaml').write_text(config.dump())
    paddle.seed(3)
    model = build_halonet(config)
    for key, value in model.state_dict().items():
        if key.endswith('bn.weight') and not value.numpy().any():
            value.set_value(paddle.ones_like(value))                    # a fresh block would be its shortcut
    model.head.fc.weight.set_value(model.head.fc.weight * 30)
    model.eval()
    paddle.save(model.state_dict(), str(folder / 'run' / 'final.pdparams'))
    return Untrained(folder, model, config)
