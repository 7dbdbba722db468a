"""make_lists and what it finds in a folder: links, endings, hidden files, splits, names, locales."""
import os
import shutil

from tools import make_lists

import numpy as np
import pytest
from PIL import Image, features
from runs import program
from tool_runs import call, entries


def save(path, kind='JPEG', value=0):
    """A picture of this format under any name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 10, 3), value % 256, 'uint8')).save(path, kind)


def listed(folder):
    return sorted(path for part in ('train', 'val') for path, _ in entries(folder, part))


def animals(folder, count=3, classes=('cat', 'dog')):
    for name in classes:
        for i in range(count):
            save(folder / name / f'{i}.jpg', value=i)
    return sorted(f'{name}/{i}.jpg' for name in classes for i in range(count))


def test_links_are_followed_without_duplicates_or_loops(tmp_path, capsys):
    expected = animals(tmp_path)
    os.symlink('../cat', tmp_path / 'cat' / 'cat')
    os.symlink('..', tmp_path / 'cat' / 'up')
    os.symlink('../..', tmp_path / 'dog' / 'further_up')
    os.symlink('cat', tmp_path / 'a_cat')                     # comes before the real one in any order
    os.symlink('../dog/0.jpg', tmp_path / 'dog' / 'again.jpg')
    os.symlink('nowhere', tmp_path / 'dog' / 'gone.jpg')
    os.mkfifo(tmp_path / 'dog' / 'pipe.jpg')
    assert call(make_lists, tmp_path) == 0
    assert listed(tmp_path) == expected
    out = capsys.readouterr().out
    for text in ('folders linked again (4)', 'images linked again (1)', 'broken links (1)',
                 'special files (1)'):
        assert text in out


def test_links_to_other_folders_are_followed_once(tmp_path):
    animals(tmp_path / 'store', classes=('a', 'b'))
    (tmp_path / 'data').mkdir()
    for name, target in (('x', 'a'), ('y', 'b'), ('z', 'a')):
        os.symlink(tmp_path / 'store' / target, tmp_path / 'data' / name)
    os.symlink(tmp_path / 'store', tmp_path / 'store' / 'a' / 'loop')
    assert call(make_lists, tmp_path / 'data') == 0
    assert listed(tmp_path / 'data') == sorted(f'{name}/{i}.jpg' for name in 'xy' for i in range(3))


def test_linked_images_are_listed_once(tmp_path):
    animals(tmp_path / 'store')
    for name in ('cat', 'dog'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(3):
            os.symlink(tmp_path / 'store' / name / f'{i}.jpg', tmp_path / 'data' / name / f'{i}.jpg')
    os.symlink(tmp_path / 'store' / 'cat' / '0.jpg', tmp_path / 'data' / 'cat' / 'same.jpg')
    assert call(make_lists, tmp_path / 'data') == 0
    assert listed(tmp_path / 'data') == sorted(f'{name}/{i}.jpg' for name in ('cat', 'dog') for i in range(3))


def test_val_that_links_to_train_is_refused(tmp_path, capsys):
    animals(tmp_path / 'train')
    os.symlink('train', tmp_path / 'val')
    assert call(make_lists, tmp_path) == 2
    assert 'folders linked again (1)' in capsys.readouterr().err


def test_content_decides_for_unknown_endings(tmp_path, capsys):
    names = {'a.jfif': 'JPEG', 'b.jpe': 'JPEG', 'c.JPG': 'JPEG', 'd': 'PNG', 'e.data': 'GIF',
             'f.1': 'TIFF', 'g.pbm': 'PPM'}
    if features.check('avif'):
        names['h.avif'] = 'AVIF'
    for folder in ('cat', 'dog'):
        for name, kind in names.items():
            save(tmp_path / folder / name, kind)
        for name in ('notes.txt', 'more.txt', 'Thumbs.db', 'README'):
            (tmp_path / folder / name).write_text('BM no image')
        (tmp_path / folder / 'drawing.eps').write_text('%!PS-Adobe-3.0 EPSF-3.0\n')
    assert call(make_lists, tmp_path) == 0
    assert listed(tmp_path) == sorted(f'{folder}/{name}' for folder in ('cat', 'dog') for name in names)
    out = capsys.readouterr().out
    assert 'left out: .txt (4), ' in out
    assert all(text in out for text in ('.db (2)', 'without an ending (2)', '.eps (2)'))


def test_arrays_of_pixels_are_images(tmp_path, capsys):
    """Those of uint8 (H, W, C). Features and masks, which lie beside images as well, are not."""
    arrays = {'x': np.zeros((4, 5, 6), 'uint8'), 'y': np.zeros((4, 5, 6), 'uint8'),
              'features': np.zeros((4, 5, 6), 'float32'), 'mask': np.zeros((4, 5), 'uint8')}
    for folder in ('cat', 'dog'):
        (tmp_path / folder).mkdir()
        for name, array in arrays.items():
            np.save(tmp_path / folder / f'{name}.npy', array)
    assert call(make_lists, tmp_path) == 0
    assert listed(tmp_path) == ['cat/x.npy', 'cat/y.npy', 'dog/x.npy', 'dog/y.npy']
    assert 'left out: .npy (4)' in capsys.readouterr().out


def test_hidden_files_and_thumbnails_are_counted(tmp_path, capsys):
    expected = animals(tmp_path)
    for name in ('cat/@eaDir/0.jpg/THUMB.jpg', 'cat/.thumbnails/1.jpg', '__MACOSX/cat/._0.jpg',
                 'dog/.ipynb_checkpoints/0.jpg',
                 'dog/._0.jpg', '.git/x.jpg'):
        save(tmp_path / name)
    assert call(make_lists, tmp_path) == 0
    assert listed(tmp_path) == expected and (tmp_path / 'class_names.txt').read_text() == 'cat\ndog\n'
    out = capsys.readouterr().out
    for text in ('in @eaDir', 'in .thumbnails', 'in __MACOSX', 'in .ipynb_checkpoints', 'hidden', 'in .git'):
        assert f'{text} (1)' in out


@pytest.mark.parametrize('train, val', [
    ('Train', 'Test'), ('train', 'valid'), ('TRAIN', 'Validation'), ('training', 'testing'),
    ('train', 'VAL')])
def test_all_names_of_splits_are_accepted(tmp_path, train, val):
    for part in (train, val):
        animals(tmp_path / part)
    assert call(make_lists, tmp_path) == 0
    assert {path.split('/')[0] for path, _ in entries(tmp_path, 'train')} == {train}
    assert {path.split('/')[0] for path, _ in entries(tmp_path, 'val')} == {val}
    assert (tmp_path / 'class_names.txt').read_text() == 'cat\ndog\n'


def test_val_is_taken_before_test(tmp_path, capsys):
    for part in ('train', 'val', 'test', 'more'):
        animals(tmp_path / part)
    assert call(make_lists, tmp_path) == 0
    assert {path.split('/')[0] for path, _ in entries(tmp_path, 'val')} == {'val'}
    labels = {path.removeprefix('test/'): label for path, label in entries(tmp_path, 'test')}
    assert labels == {path.removeprefix('val/'): label for path, label in entries(tmp_path, 'val')}
    out = capsys.readouterr().out
    assert 'folders that are not listed: more\n' in out and 'test images in test_list.txt' in out


def test_flat_test_folder_has_no_list(tmp_path, capsys):
    for part in ('train', 'val'):
        animals(tmp_path / part)
    save(tmp_path / 'test' / '1.png')
    assert call(make_lists, tmp_path) == 0
    assert not (tmp_path / 'test_list.txt').exists()
    assert 'folders that are not listed: test' in capsys.readouterr().out


@pytest.mark.parametrize('folders, message', [
    (('train/cat', 'train/dog', 'Train/cat', 'val/cat'), 'Train and train are the same split'),
    (('train/cat', 'train/dog', 'val/cat', 'valid/cat'), 'val and valid are the same split'),
    (('cat', 'dog', 'test'), 'test/ looks like a split, and there is no train/'),
    (('Valid/cat', 'Valid/dog'), 'Valid/ looks like a split'),
    (('car', 'plane', 'train'), 'has train/ and no val/'),
    (('train/train/cat', 'train/train/dog', 'train/val/cat', 'val/cat'),
     'train/train looks like a split in a split'),
])
def test_ambiguous_splits_and_classes_are_refused(tmp_path, capsys, folders, message):
    for name in folders:
        save(tmp_path / name / '0.jpg')
        save(tmp_path / name / '1.jpg')
    before = sorted(tmp_path.rglob('*'))
    assert call(make_lists, tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert sorted(tmp_path.rglob('*')) == before


def test_class_named_train_is_accepted(tmp_path):
    for part in ('train', 'val'):
        animals(tmp_path / part, classes=('car', 'train'))
    assert call(make_lists, tmp_path) == 0
    assert (tmp_path / 'class_names.txt').read_text() == 'car\ntrain\n'


def test_classes_without_images_are_named(tmp_path, capsys):
    animals(tmp_path)
    save(tmp_path / 'bird' / '0.jpg')
    (tmp_path / 'cow').mkdir()
    (tmp_path / 'cow' / 'a.heic').write_bytes(b'\0\0\0\x18ftypheic')
    save(tmp_path / 'loose.jpg')
    assert call(make_lists, tmp_path) == 0
    out = capsys.readouterr().out
    assert 'classes without a validation image: bird' in out
    assert 'folders without images, which are no classes: cow' in out
    assert '.heic (1)' in out and 'images in no class folder (1)' in out


@pytest.mark.parametrize('name', [
    '10.4\u202fAM.jpg', '\xe4\xdf\u98df.jpg', 'a\u200db.jpg', 'a\u3000b.jpg', '\u202eb.jpg', 'a\xa0b .jpg'])
def test_unusual_names_are_listed(tmp_path, name):
    animals(tmp_path)
    save(tmp_path / 'cat' / name)
    assert call(make_lists, tmp_path) == 0
    assert f'cat/{name}' in listed(tmp_path)


@pytest.mark.parametrize('name', ['a\x1b[31mb.jpg', 'a\nb.jpg', 'a\tb.jpg', 'a\u2028b.jpg', 'a\x85b.jpg',
                                  b'a\xffb.jpg'])
def test_names_outside_the_list_format_are_refused(tmp_path, capsys, name):
    animals(tmp_path)
    shutil.copy(tmp_path / 'cat' / '0.jpg', os.path.join(tmp_path, 'cat', os.fsdecode(name)))
    assert call(make_lists, tmp_path) == 2
    error = capsys.readouterr().err
    assert 'a list' in error and error.count('\n') == 1 and error.rstrip('\n').isprintable()
    assert not (tmp_path / 'train_list.txt').exists()


NOT_UTF_8 = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': ''}


def test_lists_are_the_same_in_a_locale_without_utf_8(tmp_path):
    for name in ('Bär', '食'):
        animals(tmp_path / 'data' / name, classes=('ü', 'x'))
    assert call(make_lists, tmp_path / 'data') == 0
    before = {path: path.read_bytes() for path in (tmp_path / 'data').glob('*.txt')}
    # it would refuse to write other lists
    done = program('tools/make_lists.py', tmp_path / 'data', **NOT_UTF_8)
    assert '2 classes' in done.stdout
    done = program('tools/check_data.py', tmp_path / 'data', **NOT_UTF_8)
    assert 'no bad files' in done.stdout and '12 images' not in done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / 'data').glob('*.txt')} == before
    (tmp_path / 'data' / '食' / 'x' / '0.jpg').write_bytes(b'')
    done = program('tools/check_data.py', tmp_path / 'data', check=False, **NOT_UTF_8)
    assert done.returncode == 1 and 'the file is empty' in done.stdout and 'Traceback' not in done.stderr
