"""tools/prepare_imagenet.py on small imitations of the forms in which ImageNet is distributed."""
import os
import tarfile
import zipfile
from pathlib import Path

from tools import prepare_imagenet

import pytest
from archived import pack_tar
from runs import make_images
from scipy.io import savemat

from data import archives, class_names
from data.list_file import read_list

CLASSES = ['n01440764', 'n01443537', 'n01484850']   # tench, goldfish, great white shark
ORDER = [2, 3, 1]                                   # the development kit's ids of these


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """{name: (content, label)} of 6 training and 5 validation images, with ImageNet's names."""
    folder = Path(make_images(tmp_path_factory.mktemp('pictures') / 'data'))
    found = {}
    for i in range(6):
        found[f'{CLASSES[i % 3]}_{i}.JPEG'] = (folder / 'train' / f'{i}.png').read_bytes(), i % 3
    for i in range(5):
        found[f'ILSVRC2012_val_{i + 1:08}.JPEG'] = (folder / 'val' / f'{i}.png').read_bytes(), i * 2 % 3
    return found


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_tree(pictures, folder, flat_val):
    for name, (content, label) in pictures.items():
        if name.startswith('n'):
            write(folder / 'train' / CLASSES[label] / name, content)
        else:
            write(folder / 'val' / ('' if flat_val else CLASSES[label]) / name, content)


def solution(pictures):
    rows = [f'{name[:-5]},{CLASSES[label]} 1 2 3 4 {CLASSES[label]} 5 6 7 8'
            for name, (_, label) in pictures.items() if name.startswith('I')]
    return '\n'.join(['ImageId,PredictionString', *reversed(rows), '']).encode()


def class_folders(pictures, folder):
    write_tree(pictures, folder, flat_val=False)


def links(pictures, folder):
    write_tree(pictures, folder.parent / 'disk', flat_val=False)
    for name in ('train', 'val'):
        (folder / name).symlink_to(folder.parent / 'disk' / name)
    (folder / 'again').symlink_to(folder)


def flat_and_csv(pictures, folder):
    write_tree(pictures, folder, flat_val=True)
    write(folder / 'LOC_val_solution.csv', solution(pictures))


def kaggle(pictures, folder):
    tree = folder.parent / 'tree'
    write_tree(pictures, tree, flat_val=True)
    with zipfile.ZipFile(folder / 'imagenet-object-localization-challenge.zip', 'w') as archive:
        for path in sorted(tree.rglob('*.JPEG')):
            archive.write(path, f'ILSVRC/Data/CLS-LOC/{path.relative_to(tree)}')
        archive.writestr('ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG', b'no label')
        archive.writestr('LOC_val_solution.csv', solution(pictures))


def official(pictures, folder):
    tree = folder.parent / 'tree'
    write_tree(pictures, tree, flat_val=True)
    for name in CLASSES:
        pack_tar(tree / 'train' / name, tree / f'{name}.tar')
    pack_tar(tree, folder / 'ILSVRC2012_img_train.tar', [f'{name}.tar' for name in CLASSES])
    pack_tar(tree / 'val', folder / 'ILSVRC2012_img_val.tar')
    ids = {label: ORDER[label] for label in range(3)}
    truth = [str(ids[label]) for name, (_, label) in pictures.items() if name.startswith('I')]
    write(tree / 'data' / 'ILSVRC2012_validation_ground_truth.txt', '\n'.join(truth).encode())
    synsets = [{'ILSVRC2012_ID': ids[label], 'WNID': name, 'num_children': 0}
               for label, name in enumerate(CLASSES)]
    savemat(tree / 'data' / 'meta.mat', {'synsets': synsets_array(synsets)})
    with tarfile.open(folder / 'ILSVRC2012_devkit_t12.tar.gz', 'w:gz') as kit:
        kit.add(tree / 'data', 'ILSVRC2012_devkit_t12/data')


def synsets_array(rows):
    import numpy as np
    array = np.zeros(len(rows), [(key, object) for key in rows[0]])
    for i, row in enumerate(rows):
        array[i] = tuple(row.values())
    return array


def hub(pictures, folder):
    from pyarrow import Table, parquet
    (folder / 'data').mkdir()
    for start, part in (('n', 'train'), ('I', 'validation')):
        rows = [item for item in pictures.items() if item[0].startswith(start)]
        image = [{'bytes': content, 'path': name} for name, (content, _) in rows]
        table = Table.from_pydict({'image': image, 'label': [label for _, (_, label) in rows]})
        parquet.write_table(table, folder / 'data' / f'{part}-00000-of-00001.parquet', row_group_size=2)


FORMS = {form.__name__: form for form in (class_folders, links, flat_and_csv, kaggle, official, hub)}


def prepare(*words):
    return prepare_imagenet.main(prepare_imagenet.parser().parse_args([*map(str, words)]))


def listed(folder):
    """{content of an image: its label} of both lists."""
    found = {}
    for part in ('train', 'val'):
        samples = read_list(os.path.join(folder, f'{part}_list.txt'), str(folder), 1000)
        for i in range(len(samples)):
            found[archives.open_file(samples.path(i)).read()] = int(samples.labels[i])
    return found


@pytest.mark.parametrize('form', FORMS)
def test_lists_of_each_form(pictures, tmp_path, form, monkeypatch, capsys):
    monkeypatch.setattr(prepare_imagenet, 'EXPECTED', {'training': 6, 'validation': 5})
    monkeypatch.setattr(class_names, 'imagenet_classes', lambda: dict.fromkeys(CLASSES, 'a fish'))
    (tmp_path / 'data').mkdir()
    FORMS[form](pictures, tmp_path / 'data')
    assert prepare(tmp_path / 'data') == 0
    assert listed(tmp_path / 'data') == dict(pictures.values())
    assert '3 classes, 6 training and 5 validation images' in capsys.readouterr().out
    assert prepare(tmp_path / 'data', '-unpack', tmp_path / 'unpacked') == 0
    assert listed(tmp_path / 'unpacked') == dict(pictures.values())
    first = (tmp_path / 'unpacked' / 'train_list.txt').read_text().split()[0]
    assert first.startswith('train/n01440764/')
    assert not list((tmp_path / 'unpacked').rglob('*.part'))


def test_missing_images_and_classes_are_named(pictures, tmp_path, capsys):
    class_folders(pictures, tmp_path)
    (tmp_path / 'train_images_1.tar.gz').write_bytes(b'')
    assert prepare(tmp_path) == 1
    out = capsys.readouterr().out
    assert 'missing: 6 of 1281167 training images' in out
    assert 'missing: 5 of 50000 validation images' in out
    assert 'missing: 997 classes without a training image: n01491361, ' in out
    assert 'train_images_1.tar.gz; make plain tars by gunzip' in out
    names = (tmp_path / 'class_names.txt').read_text().splitlines()
    assert len(names) == 1000 and names[:3] == ['tench', 'goldfish', 'great white shark']
    assert sorted(listed(tmp_path).values()) == sorted(label for _, label in pictures.values())


def test_lists_that_differ_are_kept(pictures, tmp_path):
    class_folders(pictures, tmp_path)
    (tmp_path / 'val_list.txt').write_text('val/mine.JPEG 3\n')
    with pytest.raises(ValueError, match='val_list.txt is there already, and differs; -force replaces it'):
        prepare(tmp_path)
    assert not (tmp_path / 'train_list.txt').exists()
    assert prepare(tmp_path, '-force') == 1 and len(listed(tmp_path)) == 11


def test_lists_that_differ_are_found_before_unpacking(pictures, tmp_path):
    class_folders(pictures, tmp_path / 'data')
    write(tmp_path / 'out' / 'val_list.txt', b'val/mine.JPEG 3')
    with pytest.raises(ValueError, match='val_list.txt is there already'):
        prepare(tmp_path / 'data', '-unpack', tmp_path / 'out')
    assert os.listdir(tmp_path / 'out') == ['val_list.txt']


def test_row_with_another_label_is_refused(pictures, tmp_path):
    strange = {name: (content, label - 1) for name, (content, label) in pictures.items()}
    hub(strange, tmp_path)
    with pytest.raises(ValueError, match='parquet/0 shows -1, which is none of the 1000 classes'):
        prepare(tmp_path)


def test_mistakes_are_explained(pictures, tmp_path):
    with pytest.raises(ValueError, match='no training image of ImageNet is here'):
        prepare(tmp_path)
    write_tree(pictures, tmp_path, flat_val=True)
    with pytest.raises(ValueError, match='5 validation images lie in no class folder, and neither LOC_val'):
        prepare(tmp_path)
    write(tmp_path / 'val' / 'n00000009' / 'ILSVRC2012_val_00000009.JPEG', b'')
    write(tmp_path / 'LOC_val_solution.csv', solution(pictures))
    with pytest.raises(ValueError, match='shows n00000009, which is none of the 1000 classes'):
        prepare(tmp_path)
