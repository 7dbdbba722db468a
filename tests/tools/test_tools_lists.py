"""make_lists and check_data: the lists hold what the folders hold, and what is wrong with images is found."""
import json
import os
import shutil
import sys
from collections import Counter

from tools import check_data, cli, make_lists

import numpy as np
import pytest
from PIL import Image
from runs import make_images, program
from tool_runs import call, entries


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 10, 3), value % 256, 'uint8')).save(path)


@pytest.fixture
def flowers(tmp_path):
    """Write one folder per class: 10 asters, 5 red roses, 1 tulip in a subfolder; and other files."""
    for name, count in (('aster', 10), ('red rose', 5)):
        for i in range(count):
            picture(tmp_path / 'flowers' / name / f'{i}.JPEG', i)
    picture(tmp_path / 'flowers' / 'tulip' / 'sub' / 'a b.png')
    for name in ('notes.txt', 'aster/notes.txt', 'aster/.hidden.png'):
        (tmp_path / 'flowers' / name).write_text('x')
    (tmp_path / 'flowers' / '.cache').mkdir()
    (tmp_path / 'flowers' / 'empty').mkdir()
    return tmp_path / 'flowers'


def test_folder_per_class_is_split_by_class(flowers, capsys):
    assert call(make_lists, flowers) == 0
    assert 'train with -data_path' in capsys.readouterr().out
    train, val = entries(flowers, 'train'), entries(flowers, 'val')
    assert (flowers / 'class_names.txt').read_text() == 'aster\nred rose\ntulip\n'
    assert Counter(label for _, label in train) == {0: 8, 1: 4, 2: 1}
    assert Counter(label for _, label in val) == {0: 2, 1: 1}
    found = {str(path.relative_to(flowers)) for path in flowers.rglob('*.[Jp]*')
             if not path.name.startswith('.')}
    assert {path for path, _ in train + val} == found and len(train + val) == len(found)
    for path, label in train + val:
        assert path.split('/')[0] == ['aster', 'red rose', 'tulip'][label]


def test_split_depends_on_the_seed_only(flowers):
    call(make_lists, flowers, '-val_share', '0.4')
    first = entries(flowers, 'val')
    assert Counter(label for _, label in first) == {0: 4, 1: 2}
    assert call(make_lists, flowers, '--val_share=0.4') == 0                  # the same again is no conflict
    assert call(make_lists, flowers, '-val_share', '0.4', '-seed', 1, '-force') == 0
    assert entries(flowers, 'val') != first
    for part in ('train', 'val'):
        (flowers / f'{part}_list.txt').unlink()
    call(make_lists, flowers, '-val_share', 0.4)
    assert entries(flowers, 'val') == first


IDS = {'1': 'n03', '2': 'n01', '3': 'n02'}          # not the order of the folders, as ImageNet's


@pytest.fixture
def imagenet(tmp_path):
    """train/ with classes n01 to n03, a flat val/ of 5 images, and what they show."""
    for name in ('n02', 'n01', 'n03'):
        picture(tmp_path / 'train' / name / f'{name}_1.JPEG')
    for i in range(1, 6):
        picture(tmp_path / 'val' / f'ILSVRC2012_val_{i:08d}.JPEG')
    return tmp_path


TRUTH = ['3', '1', '2', '2', '1']
EXPECTED = [(f'val/ILSVRC2012_val_{i:08d}.JPEG', label) for i, label in enumerate([1, 2, 0, 0, 2], 1)]


def kinds_of_labels():
    names = [f'ILSVRC2012_val_{i:08d}' for i in range(1, 6)]
    wnids = [IDS[i] for i in TRUTH]
    labels = [sorted(IDS.values()).index(wnid) for wnid in wnids]
    yield 'names', [f'{name}.JPEG {wnid}' for name, wnid in zip(names, wnids)][::-1]
    yield 'labels', [f'val/{name}.JPEG {label}' for name, label in zip(names, labels)]
    yield 'kaggle', ['ImageId,PredictionString',
                     *(f'{name},{wnid} 85 1 499 272 ' for name, wnid in zip(names, wnids))]
    yield 'ids', TRUTH


@pytest.mark.parametrize('kind, lines', [*kinds_of_labels()])
def test_flat_val_gets_the_labels_of_its_file(imagenet, kind, lines):
    (imagenet / 'truth.txt').write_text('\n'.join(lines) + '\n')
    for text in (['1 n03', '2 n01', '3 n02'], ['n03 1 kit_fox', 'n01 2 x', 'n02 3 y']):
        (imagenet / 'table.txt').write_text('\n'.join(text))
        words = ['-synsets', imagenet / 'table.txt'] if kind == 'ids' else []
        assert call(make_lists, imagenet, '-val_labels', imagenet / 'truth.txt', *words) == 0
        assert entries(imagenet, 'val') == EXPECTED
    assert entries(imagenet, 'train') == [(f'train/n0{i}/n0{i}_1.JPEG', i - 1) for i in (1, 2, 3)]


def test_meta_mat_of_imagenet_is_read(imagenet):
    from scipy.io import savemat
    kind = [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('num_children', 'O')]
    # the last is no class, but stands above others
    rows = [(int(i), name, 0) for i, name in IDS.items()] + [(4, 'n00', 3)]
    savemat(imagenet / 'meta.mat', {'synsets': np.array(rows, kind).reshape(-1, 1)})
    (imagenet / 'truth.txt').write_text('\n'.join(TRUTH))
    assert call(make_lists, imagenet, '-val_labels', imagenet / 'truth.txt', '-synsets',
                imagenet / 'meta.mat') == 0
    assert entries(imagenet, 'val') == EXPECTED


def test_val_by_class_folders_and_imagenet_names(imagenet):
    shutil.rmtree(imagenet / 'val')
    picture(imagenet / 'val' / 'n03' / 'x.png')
    assert call(make_lists, imagenet) == 0
    assert entries(imagenet, 'val') == [('val/n03/x.png', 2)]
    assert make_lists.readable(['n01440764', 'n02099601']) == ['tench', 'golden retriever']
    assert make_lists.readable(['n01440764', 'mine']) == ['n01440764', 'mine']


@pytest.mark.parametrize('change, words, message', [
    (lambda f: (f / 'truth.txt').write_text('\n'.join(TRUTH)), [], 'ids of its development kit, not labels'),
    (lambda f: (f / 'truth.txt').write_text('1\n2'), ['-synsets', 'table.txt'],
     '2 lines, and there are 5 pictures'),
    (lambda f: (f / 'truth.txt').write_text('1\n2\n3\n1\n9'), ['-synsets', 'table.txt'],
     'does not say what class 9 is'),
    (lambda f: (f / 'truth.txt').write_text('a.JPEG 1'), [],
     'says nothing about ILSVRC2012_val_00000001.JPEG'),
    (lambda f: (f / 'truth.txt').write_text('\n'.join(f'ILSVRC2012_val_0000000{i}.JPEG 3'
                                                      for i in range(1, 6))), [],
     'neither one of the 3 class folders'),
    (lambda f: (f / 'truth.txt').write_text('a.JPEG n01\nb.JPEG'), [],
     "the line 'b.JPEG' has one word and others have more"),
    (lambda f: (f / 'truth.txt').write_bytes(b'\x89PNG'), [], 'truth.txt: not a UTF-8 text file'),
    (lambda f: (f / 'truth.txt').write_text('\n'.join(TRUTH)), ['-synsets', 'meta.mat'],
     "meta.mat: not the meta.mat of"),
    (lambda f: picture(f / 'train' / 'n04' / 'x.png') or (f / 'truth.txt').write_text('\n'.join(TRUTH)),
     ['-synsets', 'table.txt'], 'differ in 1 classes, such as n04'),
])
def test_labels_that_do_not_fit_are_refused(imagenet, monkeypatch, capsys, change, words, message):
    monkeypatch.chdir(imagenet)
    (imagenet / 'table.txt').write_text('1 n03\n2 n01\n3 n02')
    (imagenet / 'meta.mat').write_bytes(b'\x89PNG' * 99)
    change(imagenet)
    assert call(make_lists, imagenet, '-val_labels', 'truth.txt', *words) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (imagenet / 'train_list.txt').exists()


def test_mistakes_of_make_lists_are_one_line(flowers, imagenet, tmp_path, capsys):
    def error(*words):
        assert call(make_lists, *words) == 2
        return capsys.readouterr().err.splitlines()[-1]
    assert 'nowhere: no such folder' in error('nowhere')
    assert 'between 0 and 1' in error(flowers, '-val_share', 1)
    assert 'a flat' not in error(imagenet) and '-val_labels FILE says what' in error(imagenet)
    assert 'found 0' in error(flowers / 'empty')
    assert call(make_lists, flowers) == 0
    assert 'differs; -force' in error(flowers, '-val_share', 0.5)
    picture(flowers / 'aster' / ' space.png')
    assert call(make_lists, flowers, '-force') == 0           # inside a path a space is fine
    picture(flowers / '#misc' / 'x.png')
    assert 'starts with #' in error(flowers, '-force')
    assert 'has no train/: -val_labels, and' in error(flowers, '-val_labels', 'nowhere')
    for words in (['-val_share', 0.3], ['-synsets', 'nowhere']):
        assert 'has train/: -val_labels, and' in error(imagenet, *words)
    for part in ('train', 'val'):
        for name in ('#misc', 'plain'):
            picture(tmp_path / 'both' / part / name / 'x.png')
    assert "'#misc': a list cannot hold" in error(tmp_path / 'both')          # nor class_names.txt


# ---- check_data

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images') / 'data')


def test_good_data_is_described(images, capsys):
    assert call(check_data, images, '-workers', 2, '-classes', 4) == 0
    out = capsys.readouterr().out
    assert '20 images' in out and '11 images' in out and 'no bad files' in out and '24x20' in out


@pytest.mark.parametrize('workers', [0, 3])
def test_bad_files_duplicates_and_labels_are_found(images, tmp_path, capsys, workers):
    shutil.copytree(images, tmp_path / 'data')
    data = tmp_path / 'data'
    whole = (data / 'train/3.png').read_bytes()
    (data / 'train/3.png').write_bytes(whole[:200])
    (data / 'train/5.png').write_bytes(b'')
    (data / 'val/2.png').unlink()
    shutil.copy(data / 'train/8.png', data / 'val/0.png')
    # the same image with labels 1 and 2
    shutil.copy(data / 'train/9.png', data / 'train/10.png')
    with open(data / 'train_list.txt', 'a') as file:
        file.write('train/0.png 7\n')
    assert call(check_data, data, '-workers', workers, '-json', tmp_path / 'report.json') == 1
    out = capsys.readouterr().out
    report = json.loads((tmp_path / 'report.json').read_text())
    assert [bad['where'].rsplit('/', 1)[1] for bad in report['bad']] == ['train_list.txt:4',
                                                                         'train_list.txt:6', 'val_list.txt:3']
    assert 'train_list.txt:4' in out and 'truncated' in out.lower() and 'the file is empty' in out
    assert [(pair['train'], pair['val']) for pair in report['in_both']] == [('train/8.png', 'val/0.png')]
    assert 'in both' in out and 'val/0.png' in out
    assert [sorted(group) for group in report['other_label']] == [['train/0.png', 'train/0.png'],
                                                                  ['train/10.png', 'train/9.png']]
    assert report['train']['images'] == 21 and report['val']['images'] == 11
    assert report['train']['per_class'] == {'0': 5, '1': 5, '2': 5, '3': 5, '4': 0, '5': 0, '6': 0, '7': 1}
    assert 'without a training image: 4, 5, 6' in out


def test_modes_are_reported_with_their_effect(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8))
    frames = [Image.new('RGB', (8, 8), color).quantize(4) for color in ('red', 'green', 'blue')]
    images = {
        'a.png': (Image.new('RGBA', (8, 8)), {}), 'b.png': (Image.new('LA', (8, 8)), {}),
        'c.png': (grey, {}), 'd.tif': (grey, {}),
        'e.jpg': (Image.new('CMYK', (8, 8)), {}),
        'f.gif': (frames[0], {'save_all': True, 'append_images': frames[1:]}),
        'g.jpg': (Image.new('RGB', (8, 8)), {'exif': exif}), 'h.jpg': (Image.new('L', (8, 8)), {}),
        'i.png': (Image.new('RGB', (8, 8)), {'transparency': (1, 2, 3)}),
    }
    for name, (image, options) in images.items():
        image.save(tmp_path / name, **options)
    (tmp_path / 'j.jpg').write_text('%!PS-Adobe-3.0 EPSF-3.0')
    os.mkfifo(tmp_path / 'k.jpg')
    (tmp_path / 'train_list.txt').write_text(''.join(f'{name} 0\n' for name in [*images, 'j.jpg', 'k.jpg']))
    assert call(check_data, tmp_path, '-workers', 0, '-json', tmp_path / 'report.json') == 1
    out = capsys.readouterr().out
    for text in ('3 with transparency: composited on DATA.BACKGROUND', '2 with 16 bits: scaled',
                 '1 in CMYK: ',
                 '1 with a palette: ', '1 with several frames: the first',
                 '1 with an EXIF orientation: read as stored',
                 'EPS or PostScript', 'a FIFO'):
        assert text in out, text
    train = json.loads((tmp_path / 'report.json').read_text())['train']
    assert train['traits'] == {'alpha': 3, '16 bits': 2, 'CMYK': 1, 'palette': 1, 'frames': 1,
                               'orientation': 1}
    assert train['formats'] == {'PNG': 4, 'TIFF': 1, 'JPEG': 3, 'GIF': 1}
    assert sum(train['modes'].values()) == 9
    assert call(check_data, tmp_path, '-workers', 0, '-max_pixels', 63) == 1
    assert '8 x 8 = 64 pixels are more than DATA.MAX_PIXELS 63' in capsys.readouterr().out


def test_mistakes_of_check_data_are_one_line(images, tmp_path, capsys):
    assert call(check_data, tmp_path) == 2
    assert 'neither train_list.txt nor val_list.txt' in capsys.readouterr().err
    assert call(check_data, images, '-workers', -1) == 2
    assert call(check_data, images, '-classes', 3) == 2
    assert 'label 3 is not in 0..2' in capsys.readouterr().err
    (tmp_path / 'absurd').mkdir()
    (tmp_path / 'absurd' / 'train_list.txt').write_text('0.png 30000000\n')
    assert call(check_data, tmp_path / 'absurd') == 2
    assert 'label 30000000 is not in' in capsys.readouterr().err
    assert call(check_data, images, '-json', tmp_path / 'none' / 'x') == 2
    out, err = capsys.readouterr()
    assert out == '' and 'none/x: cannot be written: No such' in err          # before all is read


def test_bad_class_names_are_reported_before_reading_images(images, tmp_path, capsys, monkeypatch):
    shutil.copytree(images, tmp_path / 'data')
    (tmp_path / 'data' / 'class_names.txt').write_bytes(b'\x89PNG')
    monkeypatch.setattr(check_data, 'check', lambda *words: pytest.fail('it reads'))
    assert call(check_data, tmp_path / 'data') == 2
    assert 'class_names.txt: not a UTF-8 text file' in capsys.readouterr().err


def test_programs_run_from_any_folder(flowers):
    for name in ('make_lists', 'check_data'):
        done = program(f'{cli.ROOT}/tools/{name}.py', flowers, check=False)
        assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert '3 classes, 13 training and 3 validation images' in program('tools/make_lists.py', flowers).stdout
    assert os.path.isabs(sys.executable)
