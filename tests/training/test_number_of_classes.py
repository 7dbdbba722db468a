"""MODEL.NUM_CLASSES and the data: taken from them where it is -1, compared with them otherwise."""
import logging
import os

import utils

import pytest
import yaml
from runs import TINY, make_images

import datasets
from config import get_config
from halonet import build_halonet
from training import engine


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / 'data')


def start(images, output, *opts):
    short = ['TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0]
    return engine.run(get_config(
        None, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(output), *short, *opts]))


def name_classes(images, count):
    with open(os.path.join(images, 'class_names.txt'), 'w', encoding='utf-8') as file:
        file.write('# names\n' + ''.join(f'name {i}\n' for i in range(count)))


def recorded(folder):
    return yaml.safe_load((folder / 'config.yaml').read_text())['MODEL']['NUM_CLASSES']


@pytest.mark.parametrize('names, expected', [(0, 4), (4, 4), (7, 7)])
def test_number_of_classes_comes_from_the_data(images, tmp_path, names, expected):
    if names:
        name_classes(images, names)
    start(images, tmp_path / 'run', 'MODEL.NUM_CLASSES', -1)
    assert recorded(tmp_path / 'run') == expected
    model = build_halonet(get_config(str(tmp_path / 'run' / 'config.yaml')))
    assert model.state_dict()['head.fc.bias'].shape == [expected]
    source = 'class_names.txt' if names else 'train_list.txt'
    assert f'{expected} classes, as {images}/{source} says' in (tmp_path / 'run/log.txt').read_text()


def test_class_of_the_evaluation_alone_is_counted(images, tmp_path):
    with open(os.path.join(images, 'val_list.txt'), 'a', encoding='utf-8') as file:
        file.write('val/0.png 5\n')
    start(images, tmp_path / 'run', 'MODEL.NUM_CLASSES', -1)
    assert recorded(tmp_path / 'run') == 6


def test_run_with_counted_classes_is_resumed_and_evaluated(images, tmp_path):
    start(images, tmp_path / 'run', 'MODEL.NUM_CLASSES', -1)
    start(images, tmp_path / 'run', 'MODEL.NUM_CLASSES', -1, 'MODEL.RESUME', 'auto')
    for count in (-1, 4):
        start(images, tmp_path / 'eval', 'MODEL.NUM_CLASSES', count, 'EVAL', True,
              'MODEL.PRETRAINED', str(tmp_path / 'run/final.pdparams'))


def lines_about_classes(caplog):
    return [record.getMessage() for record in caplog.records if 'outputs' in record.getMessage()]


@pytest.mark.parametrize('names, opts', [(0, []), (3, []), (0, ['EVAL', True]), (3, ['EVAL', True])])
def test_fewer_classes_than_outputs_are_logged(images, tmp_path, caplog, monkeypatch, names, opts):
    """Of the names if there are some, else of the lists."""
    if names:
        name_classes(images, names)
    if opts:
        start(images, tmp_path / 'run', 'MODEL.NUM_CLASSES', 10)
        opts = [*opts, 'MODEL.PRETRAINED', str(tmp_path / 'run/final.pdparams')]
    monkeypatch.setattr(utils, 'setup_logger', lambda folder: None)
    caplog.clear()
    logging.getLogger('halonet').propagate = True
    with caplog.at_level(logging.WARNING, 'halonet'):
        start(images, tmp_path / 'now', 'MODEL.NUM_CLASSES', 10, *opts)
    file = 'class_names.txt' if names else 'val_list.txt' if opts else 'train_list.txt'
    count = names or 4
    assert lines_about_classes(caplog) == [
        f'{images}/{file} has {count} classes and the model 10 outputs (MODEL.NUM_CLASSES); '
        f'set it to {count}, or to -1: as many classes as the data have']


def test_right_number_of_classes_is_not_logged(images, tmp_path):
    name_classes(images, 4)
    start(images, tmp_path / 'run')
    assert 'outputs' not in (tmp_path / 'run/log.txt').read_text()


@pytest.mark.parametrize('opts', [[], ['EVAL', True, 'MODEL.PRETRAINED', 'x']])
def test_more_names_than_outputs_are_refused(images, tmp_path, opts):
    name_classes(images, 5)
    message = 'class_names.txt has 5 names and the model 4 outputs .*; set it to 5, or to -1'
    with pytest.raises(ValueError, match=message):
        start(images, tmp_path / 'run', *opts)


def test_more_labels_than_outputs_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match=r'val_list.txt:4: label 3 is not in 0..2'):
        start(images, tmp_path / 'run', 'MODEL.NUM_CLASSES', 3)


def test_label_that_cannot_count_classes_is_named(images, tmp_path):
    with open(os.path.join(images, 'train_list.txt'), 'a', encoding='utf-8') as file:
        file.write('train/0.png 90210\n')
    with pytest.raises(ValueError, match=r'train_list.txt:21: label 90210, but there are fewer images'):
        start(images, tmp_path / 'run', 'MODEL.NUM_CLASSES', -1)


def test_number_of_classes_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match='NUM_CLASSES is -1'):
        build_halonet(get_config(None, [*TINY, 'MODEL.NUM_CLASSES', -1]))
    with pytest.raises(FileNotFoundError, match='no such list file, for there is no folder .*nowhere'):
        datasets.count_classes(str(tmp_path / 'nowhere'), read_lists=True)


def test_missing_list_names_make_lists(tmp_path):
    folder = tmp_path / 'my pictures'
    folder.mkdir()
    message = rf"train_list.txt: no such list file.*make_lists.py '{folder}' makes it"
    with pytest.raises(FileNotFoundError, match=message):
        start(str(folder), tmp_path / 'run', 'MODEL.NUM_CLASSES', -1)
    with pytest.raises(FileNotFoundError, match='val_list.txt: no such list file.*tools/make_lists.py'):
        start(str(folder), tmp_path / 'run')
