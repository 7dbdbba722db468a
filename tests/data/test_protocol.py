"""The files of a subset of the classes and of several right labels: their formats, and mistakes in them."""
import json

import numpy as np
import pytest

from data import class_names, list_file, protocol


def samples_of(tmp_path, *names, labels=None):
    labels = labels or [0] * len(names)
    lines = [f'{name} {label}\n' for name, label in zip(names, labels)]
    (tmp_path / 'list.txt').write_text('# a comment\n' + ''.join(lines))
    return list_file.read_list(str(tmp_path / 'list.txt'), str(tmp_path), 1000)


def val_image(number):
    return f'val/ILSVRC2012_val_{number:08}.JPEG'


# ---- a subset of the classes

def test_classes_by_labels_names_and_wordnet_ids(write, tmp_path):
    ids = list(class_names.imagenet_classes())
    path = write('classes.txt', f'{ids[7]}\n# a comment\n\n3\n{ids[999]}\n')
    assert protocol.read_classes(path, 1000).tolist() == [7, 3, 999]
    assert protocol.read_classes(write('classes.txt', 'goldfish\nn01440764\n'), 1000).tolist() == [1, 0]
    write('class_names.txt', 'owl\nwren\n2\n')
    weights = str(tmp_path / 'final.pdparams')
    path = write('classes.txt', '2\nowl\n')
    assert protocol.read_classes(path, 3, weights).tolist() == [2, 0]
    assert protocol.read_classes(write('classes.txt', '2\n0\n'), 3, weights).tolist() == [2, 0]


@pytest.mark.parametrize('text, message', [
    ('owl\n', "'owl' is no class of the model: a label in 0..3"), ('1\n4\n', "'4' is no class"),
    ('1\n-1\n', "'-1' is no class"), ('2\n1\n2\n', "'2' and '2' are the same class, label 2"),
    ('n01440764\n', 'is no class'), ('# nothing\n', 'the file is empty')])
def test_mistake_in_the_classes_is_one_line(write, text, message):
    path = write('classes.txt', text)
    with pytest.raises(ValueError) as error:
        protocol.read_classes(path, 4)
    assert message in str(error.value) and str(error.value).startswith(path)
    assert '\n' not in str(error.value)


def test_binary_file_of_classes_is_refused(tmp_path):
    (tmp_path / 'classes.txt').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='not a UTF-8 text file; expected a class per line'):
        protocol.read_classes(str(tmp_path / 'classes.txt'), 4)


def test_list_with_a_label_that_the_classes_lack(write, tmp_path):
    samples = samples_of(tmp_path, 'a.png', 'b.png', labels=[0, 2])
    with pytest.raises(ValueError, match=r'list\.txt:3: label 2, but .*classes\.txt has 2 lines'):
        protocol.read(write('classes.txt', '3\n1\n'), '', samples, 4, '')


def test_labels_become_those_of_the_model(write, tmp_path):
    samples = samples_of(tmp_path, 'a.png', 'b.png', 'c.png', labels=[0, 2, 0])
    classes, labels = write('classes.txt', '30\n10\n20\n'), write('labels.json', json.dumps(
        {'a.png': [0, 1], 'b.png': [], 'c.png': [2]}))
    found, judging = protocol.read(classes, labels, samples, 40, '')
    assert found.labels.tolist() == [30, 20, 30] and samples.labels.tolist() == [0, 2, 0]
    assert judging.classes.tolist() == [30, 10, 20]
    assert judging.right.tolist() == [[30, 10], [-1, -1], [20, -1]] and judging.judged() == [0, 2]
    found, judging = protocol.read('', '', samples, 40, '')
    assert found is samples and judging == protocol.Protocol() and judging.judged() is None


# ---- several right labels

def test_labels_of_an_object_and_of_the_published_list(write, tmp_path):
    samples = samples_of(tmp_path, val_image(3), val_image(1), 'val.tar/' + val_image(2))
    lists = [[5], [], [7, 8, 9]]
    expected = [[7, 8, 9], [5, -1, -1], [-1, -1, -1]]
    objects = [{val_image(3): [7, 8, 9], val_image(1): [5], 'val.tar/' + val_image(2): []},
               {f'ILSVRC2012_val_{i:08}.JPEG': labels for i, labels in enumerate(lists, 1)}]
    for content in (lists, *objects):
        path = write('labels.json', json.dumps(content))
        np.testing.assert_array_equal(protocol.read_right_labels(path, samples, 10), expected)


@pytest.mark.parametrize('text, message', [
    ('{"a.png": [1', 'not JSON'), ('[' * 100_000, 'not JSON'), ('3', 'expected JSON, {'),
    ('{}', 'has no entry for a.png, the image of'), ('{"a.png": 1}', "a.png has '1'; expected a list"),
    ('{"a.png": [1, 10]}', "a.png has the label '10'; expected whole numbers in 0..9"),
    ('{"a.png": [-1]}', "the label '-1'"), ('{"a.png": ["1"]}', 'the label'),
    ('{"a.png": [1.0]}', "the label '1.0'"), ('{"a.png": [true]}', "the label 'True'"),
    ('{"a.png": []}', 'no image of'),
    ('[[1]]', 'names no such image; write a JSON object with names')])
def test_mistake_in_the_labels_is_one_line(write, tmp_path, text, message):
    path = write('labels.json', text)
    with pytest.raises(ValueError) as error:
        protocol.read_right_labels(path, samples_of(tmp_path, 'a.png'), 10)
    assert message in str(error.value) and str(error.value).startswith(path)
    assert '\n' not in str(error.value)


def test_list_that_is_too_short(write, tmp_path):
    path = write('labels.json', '[[1], [2]]')
    with pytest.raises(ValueError, match='has no entry for 00000003, the image of'):
        protocol.read_right_labels(path, samples_of(tmp_path, val_image(3)), 10)


def test_missing_files(tmp_path):
    samples = samples_of(tmp_path, 'a.png')
    for files in ((str(tmp_path / 'no'), ''), ('', str(tmp_path / 'no'))):
        with pytest.raises(FileNotFoundError):
            protocol.read(*files, samples, 10, '')
