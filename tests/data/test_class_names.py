"""Class names: where they come from, and that they travel with a run, its evaluations and its exports."""
import json
import os
import re

from tools import cli, export, predict

import paddle
import pytest
from runs import TINY, make_images

from config import get_config
from data import class_names
from halonet import build_halonet
from reporting import report
from training import engine

ANIMALS = ['cat', 'dog', 'emu', 'fox']


@pytest.fixture
def data(tmp_path):
    folder = make_images(tmp_path / 'data')
    write(tmp_path / 'data', ANIMALS)
    return folder


def write(folder, names):
    (folder / 'class_names.txt').write_text(''.join(f'{name}\n' for name in names), encoding='utf-8')


def read(folder):
    return (folder / 'class_names.txt').read_text(encoding='utf-8').splitlines()


def run(data, output, *opts):
    return engine.run(get_config(None, [*TINY, 'DATA.DATA_PATH', data, 'OUTPUT', str(output),
                                        'TRAIN.NUM_EPOCHS', 1,
                                        'TRAIN.WARMUP_EPOCHS', 0.0, *opts]))


def call(tool, *words):
    with pytest.raises(SystemExit) as stop:
        tool.parser().run(tool.main, [str(word) for word in words])
    return stop.value.code


def predicted_names(run_folder, picture, capsys, *words):
    """{label: name} as predict says for a picture."""
    assert call(predict, '-pretrained', run_folder / 'final.pdparams', picture, '-quiet', '-json', '-',
                *words) == 0
    (item,) = json.loads(capsys.readouterr().out)['pictures']
    return {top['label']: top['name'] for top in item['top']}


# ---- where names come from

def test_imagenet_class_names():
    classes = class_names.imagenet_classes()
    assert len(classes) == 1000 and list(classes) == sorted(classes)
    assert all(re.fullmatch(r'n\d{8}', key) for key in classes)
    names = cli.find_class_names(get_config(None, ['DATA.DATA_PATH', 'nowhere']))
    assert len({*names}) == 1000
    for label, name in {0: 'tench', 1: 'goldfish', 134: 'crane (bird)', 207: 'golden retriever',
                        281: 'tabby', 388: 'giant panda', 463: 'bucket', 517: 'crane (machine)',
                        639: 'tank suit', 724: 'pirate', 817: 'sports car',
                        933: 'cheeseburger', 954: 'banana', 985: 'daisy', 999: 'toilet tissue'}.items():
        assert names[label] == name
    assert classes['n02099601'] == 'golden retriever' and list(classes)[985] == 'n11939491'


def found(tmp_path, count=4, **more):
    """The names that are found, and the warnings."""
    warnings = []
    folders = {'run_folder': str(tmp_path / 'run'), 'data_path': str(tmp_path / 'data')}
    return class_names.find(count, **folders, warn=warnings.append, **more), warnings


def test_sources_of_names_in_their_order(tmp_path):
    for folder in ('run', 'data'):
        (tmp_path / folder).mkdir()
    assert found(tmp_path) == (None, [])
    lines = [f'val/{"dcba"[i % 4]}/{i}.png {i % 4}\n' for i in range(9)]
    (tmp_path / 'data' / 'val_list.txt').write_text(''.join(lines))
    assert found(tmp_path) == (['d', 'c', 'b', 'a'], [])
    write(tmp_path / 'data', ANIMALS)
    assert found(tmp_path) == (ANIMALS, [])
    (tmp_path / 'run' / 'class_names.txt').write_text('# beside the weights\na\nb\n\nc\nd\n')
    assert found(tmp_path) == (['a', 'b', 'c', 'd'], [])
    (tmp_path / 'own.txt').write_text('e\nf\ng\nh\n')
    assert found(tmp_path, file=str(tmp_path / 'own.txt')) == (['e', 'f', 'g', 'h'], [])


def test_class_folders_count_only_if_each_label_has_its_own(tmp_path):
    (tmp_path / 'data').mkdir()
    listed = tmp_path / 'data' / 'val_list.txt'
    for text in ('a/1.png 0\nb/2.png 1\n', 'x/1.png 0\nx/2.png 1\nx/3.png 2\nx/4.png 3\n',
                 'a/1.png 0\nb/1.png 0\nc/2.png 1\nd/3.png 2\ne/4.png 3\n'):
        listed.write_text(text)
        assert found(tmp_path) == (None, [])
    listed.write_text('n01440764/1.png 0\nn02099601/2.png 1\n')
    assert found(tmp_path, count=2) == (['tench', 'golden retriever'], [])


@pytest.mark.parametrize('folder', ['run', 'data'])
@pytest.mark.parametrize('content', [b'one\n', b'1\n2\n3\n4\n5\n', b'\x89PNG'])
def test_wrong_number_of_names_is_not_used(tmp_path, folder, content):
    """Not even ImageNet's are, for a model of 1000 classes: it has learned something else."""
    for name in ('run', 'data'):
        (tmp_path / name).mkdir()
    path = tmp_path / folder / 'class_names.txt'
    path.write_bytes(content)
    for count in (4, 1000):
        names, warnings = found(tmp_path, count=count)
        assert names is None and len(warnings) == 1 and warnings[0].startswith(str(path)), warnings
    with pytest.raises(ValueError, match=re.escape(str(path))):
        class_names.find(4, file=str(path))


# ---- they travel

def test_class_names_of_weights_survive_changed_data(data, tmp_path, capsys, caplog):
    run(data, tmp_path / 'run')
    assert read(tmp_path / 'run') == ANIMALS
    # cat/ was renamed to zebra/, and the lists made again
    write(tmp_path / 'data', ['dog', 'emu', 'fox', 'zebra'])
    expected = dict(enumerate(ANIMALS))
    picture = tmp_path / 'data' / 'val' / '0.png'
    capsys.readouterr()
    assert predicted_names(tmp_path / 'run', picture, capsys) == expected
    page = tmp_path / 'page.html'
    report.write([str(tmp_path / 'run')], page)
    shown = re.findall(r'<span class="name"[^>]*>(.*?)</span>', page.read_text(encoding='utf-8'))
    assert sorted(shown) == ANIMALS
    run(data, tmp_path / 'eval', 'EVAL', True, 'MODEL.PRETRAINED', str(tmp_path / 'run' / 'final.pdparams'))
    assert read(tmp_path / 'eval') == ANIMALS
    assert "label 0 is 'cat' and 'dog'" in (tmp_path / 'eval' / 'log.txt').read_text(encoding='utf-8')
    capsys.readouterr()
    os.remove(tmp_path / 'data' / 'class_names.txt')
    assert predicted_names(tmp_path / 'run', picture, capsys) == expected
    (tmp_path / 'own.txt').write_text('a\nb\nc\nd\n')
    assert predicted_names(tmp_path / 'run', picture, capsys, '-classes', tmp_path / 'own.txt')[0] == 'a'


def test_resumed_run_keeps_its_class_names_with_a_warning(data, tmp_path):
    run(data, tmp_path / 'run')
    write(tmp_path / 'data', ['cat', 'wolf', 'emu', 'fox'])
    more = ['TRAIN.NUM_EPOCHS', 2, 'MODEL.RESUME', 'auto', 'MODEL.RESUME_FORCE', True]
    run(data, tmp_path / 'run', *more)
    log = (tmp_path / 'run' / 'log.txt').read_text(encoding='utf-8')
    assert read(tmp_path / 'run') == ANIMALS and log.count("label 1 is 'dog' and 'wolf'") == 1
    os.remove(tmp_path / 'run' / 'class_names.txt')                      # a run of an older version gets them
    run(data, tmp_path / 'run', *more)
    assert read(tmp_path / 'run')[1] == 'wolf'


@pytest.mark.parametrize('names, kept', [(['cat', 'dog', 'emu'], ['cat', 'dog', 'emu', 'class 3']),
                                         ([], None),
                                         (['caf\u00e9', '\u98df', '<b>', 'x y'], 'all')])
def test_names_kept_by_a_run(data, tmp_path, names, kept):
    write(tmp_path / 'data', names)
    if not names:
        os.remove(tmp_path / 'data' / 'class_names.txt')
    run(data, tmp_path / 'run')
    assert (read(tmp_path / 'run') if (tmp_path / 'run' / 'class_names.txt').exists() else None) == (
        names if kept == 'all' else kept)


def test_names_of_checkpoints_and_of_a_run_in_the_data_folder(data, tmp_path):
    (tmp_path / 'data' / 'class_names.txt').write_text('# by hand\n' + '\n'.join(ANIMALS))
    run(data, data)
    # not written again
    assert (tmp_path / 'data' / 'class_names.txt').read_text().startswith('# by hand')
    (path,) = (tmp_path / 'data' / 'checkpoints').glob('*.pdckpt')
    config = get_config(None, [*TINY, 'DATA.DATA_PATH', 'nowhere', 'MODEL.PRETRAINED', str(path)])
    assert cli.find_class_names(config) == ANIMALS


def test_export_has_class_names(tmp_path, capsys):
    config = get_config(None, [*TINY, 'MODEL.ATTENTION', 'composed'])
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.yaml').write_text(config.dump())
    paddle.save(build_halonet(config).state_dict(), str(tmp_path / 'run' / 'final.pdparams'))
    words = ['-pretrained', tmp_path / 'run' / 'final.pdparams', '-format', 'paddle', '-output']
    assert call(export, *words, tmp_path / 'none') == 0
    assert 'no class names are known' in capsys.readouterr().err
    assert json.loads((tmp_path / 'none' / 'meta.json').read_text())['classes'] is None
    write(tmp_path / 'run', ANIMALS)
    assert call(export, *words, tmp_path / 'named') == 0
    assert capsys.readouterr().err.count('class names') == 0
    assert json.loads((tmp_path / 'named' / 'meta.json').read_text())['classes'] == ANIMALS
