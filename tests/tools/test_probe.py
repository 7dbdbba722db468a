"""tools/probe.py: features, nearest neighbours and the linear probe, against plain loops and scikit-learn."""
import csv
import math
import shutil

from tools import probe

import numpy as np
import paddle
import pytest
from runs import TINY, options, program
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import datasets
from config import get_config
from halonet import build_halonet
from training import results


def drawn(count, classes, seed, spread=1.0):
    """Features (N, 12) around a centre of each class, and labels (N,)."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, 12)) * 1.5
    labels = random.integers(0, classes, count)
    values = centres[labels] + spread * random.standard_normal((count, 12))
    return probe.Features(values.astype('float32'), labels, 1.0)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'w.pdparams'
    paddle.seed(3)
    paddle.save(build_halonet(get_config(None, TINY)).state_dict(), str(path))
    (path.parent / 'config.yaml').write_text(get_config(None, TINY).dump())
    return str(path)


def run_tool(weights, data, *words, check=True, **environment):
    words = ['-pretrained', weights, '-data_path', data, *words]
    return program('tools/probe.py', *words, check=check, **environment)


# ---- nearest neighbours

def plain_neighbours(train, row, k, temperature):
    """The classes with votes, the most votes first, by the definition in words."""
    def cosine(one, other):
        return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))
    row = row.astype('float64')
    scored = sorted(((cosine(one.astype('float64'), row), label) for one, label in zip(*train)), reverse=True)
    votes = {}
    for score, label in scored[:k]:
        votes[label] = votes.get(label, 0) + math.exp(score / temperature)
    return sorted(votes, key=lambda label: -votes[label])[:5]


@pytest.mark.parametrize('classes, k, temperature, memory', [
    (8, 20, 0.07, 1 << 26), (8, 20, 0.07, 1000), (3, 1, 0.07, 1), (30, 120, 0.5, 700), (2, 7, 0.07, 1 << 26)])
def test_neighbours_equal_a_plain_loop(monkeypatch, classes, k, temperature, memory):
    monkeypatch.setattr(probe, 'SCORES_AT_A_TIME', memory)
    train, val = drawn(120, classes, 0), drawn(37, classes, 1)
    train.labels = train.labels * 1000 + 3          # with gaps, as lists may have
    found = probe.nearest_classes(train, val.values, k, temperature)
    assert found.shape == (37, 5)
    for row, ours in zip(val.values, found):
        expected = plain_neighbours((train.values, train.labels), row, k, temperature)
        assert ours.tolist() == [*expected, *[-1] * (5 - len(expected))]


def test_features_of_length_zero_are_no_error():
    train = probe.Features(np.zeros((3, 2), 'float32'), np.array([0, 1, 1]), 1.0)
    found = probe.nearest_classes(train, np.zeros((1, 2), 'float32'), 3, 0.07)
    assert found.tolist() == [[1, 0, -1, -1, -1]]


# ---- the linear probe

@pytest.mark.parametrize('count, classes', [(1, 1), (2, 2), (23, 4), (400, 7)])
def test_split_holds_out_a_part_of_each_class(count, classes):
    labels = np.random.default_rng(count).integers(0, classes, count)
    sizes = np.bincount(labels)
    if (sizes > 0).sum() < 2 or sizes.max() < 2:
        with pytest.raises(ValueError, match='train_list.txt: .* a linear probe needs two classes'):
            probe.split(labels, 0)
        return
    kept, held = probe.split(labels, 0)
    assert sorted([*kept, *held]) == list(range(count))
    for label, size in enumerate(sizes):
        assert (labels[held] == label).sum() == (size + 3) // 5      # the 2nd, the 7th, ...
    assert (probe.split(labels, 0)[1] == held).all()
    assert count < 100 or set(probe.split(labels, 1)[1]) != set(held)


@pytest.mark.parametrize('classes, spread', [(2, 2.0), (8, 1.5)])
def test_linear_probe_equals_scikit_learn(capsys, classes, spread):
    train, val = drawn(300, classes, 0, spread), drawn(90, classes, 1, spread)
    found, chosen = probe.linear_classes(train, val.values, seed=0)
    kept, held = probe.split(train.labels, 0)
    scores = []
    for c in 10.0 ** np.arange(-6, 3):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
        fitted.fit(train.values[kept], train.labels[kept])
        rows = fitted.predict_proba(train.values[held])
        loss = -np.log(rows[np.arange(len(held)), train.labels[held]]).mean()
        scores.append((fitted.score(train.values[held], train.labels[held]), -loss, c))
    assert chosen == pytest.approx(max(scores)[2])
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=chosen, max_iter=1000))
    fitted.fit(train.values, train.labels)
    np.testing.assert_array_equal(found[:, 0], fitted.predict(val.values))
    top1, top5 = probe.accuracy(found, val.labels)
    assert top1 == pytest.approx(100 * fitted.score(val.values, val.labels))
    ranks = (-fitted.predict_proba(val.values)).argsort(axis=1)[:, :5]
    assert top5 == pytest.approx(100 * (ranks == val.labels[:, None]).any(axis=1).mean())
    assert capsys.readouterr().out.count('held-out images') == 9


def test_class_without_training_images_is_wrong():
    assert probe.accuracy(np.array([[3, -1, -1, -1, -1], [0, 3, -1, -1, -1]]), np.array([7, 3])) == (0, 50)


# ---- the tool

def plain_features(images, weights, name):
    """The mean over the pixels of the last feature map, image by image."""
    config = get_config(None, TINY)
    model = build_halonet(config)
    model.set_state_dict(paddle.load(weights))
    model.eval()
    rows = []
    for line in open(f'{images}/{name}', encoding='utf-8'):
        image = datasets.Image.open(f'{images}/{line.split()[0]}')
        pixels = datasets.eval_pixels(image, 16, 1.0).transpose(2, 0, 1)[None]
        mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (config.DATA.MEAN, config.DATA.STD))
        x = paddle.to_tensor(((pixels / 255 - mean) / std).astype('float32'))
        with paddle.no_grad():
            rows.append(model.forward_features(x).numpy()[0].mean(axis=(1, 2)))
    return np.stack(rows)


def test_tool_writes_features_and_rows(images, weights, tmp_path):
    """The images have other labels than the classes of the model."""
    data = tmp_path / 'data'
    shutil.copytree(images, data)
    for name in ('train_list.txt', 'val_list.txt'):
        lines = [line.split() for line in (data / name).read_text().splitlines()]
        (data / name).write_text(''.join(f'{path} {10 * int(label)}\n' for path, label in lines))
    table = tmp_path / 'new' / 'results.csv'
    words = ['-results', table, '-features', tmp_path / 'features', '-k', 5, '-batch_size', 3]
    done = run_tool(weights, data, *words)
    arrays = {path.stem: np.load(path) for path in (tmp_path / 'features').iterdir()}
    assert sorted(arrays) == ['train_features', 'train_labels', 'val_features', 'val_labels']
    for part, count in (('train', 20), ('val', 40)):
        expected = plain_features(images, weights, f'{part}_list.txt')
        np.testing.assert_allclose(arrays[f'{part}_features'], expected, rtol=1e-4, atol=1e-6)
        assert arrays[f'{part}_labels'].tolist() == [10 * (i % 4) for i in range(count)]
    neighbours = KNeighborsClassifier(
        5, metric='cosine', algorithm='brute', weights=lambda distance: np.exp((1 - distance) / 0.07))
    neighbours.fit(arrays['train_features'].astype('float64'), arrays['train_labels'])
    expected = 100 * neighbours.score(arrays['val_features'].astype('float64'), arrays['val_labels'])
    with open(table, encoding='utf-8', newline='') as file:
        knn, linear = csv.DictReader(file)
    assert tuple(knn) == results.COLUMNS and knn['model'] == 'tiny knn k=5'
    assert float(knn['top1']) == pytest.approx(expected, abs=1e-3)
    assert linear['model'].startswith('tiny linear C=') and float(linear['top5']) == 100
    for row in (knn, linear):
        assert (row['images'], row['data'], row['weights'], row['loss']) == ('40', str(data), weights, '')
    assert f'knn k=5: top-1 {expected:.2f}' in done.stdout
    run_tool(weights, data, '-results', table, '-methods', 'knn', '-k', 5)
    with open(table, encoding='utf-8', newline='') as file:
        assert [row['top1'] for row in csv.DictReader(file)] == [knn['top1'], linear['top1'], knn['top1']]


@pytest.mark.parametrize('words, message', [
    (['-k', 0], '-k 0: it must be at least 1'), (['-k', 21], '-k 21: there are 20 training images; lower it'),
    (['-temperature', 0], '-temperature 0.0: it must be above 0'),
    (['-data_path', 'none'], 'none/train_list.txt: no such list file'),
    (['-results', 'tools'], 'cannot be written: Is a directory')])
def test_mistake_is_one_line(images, weights, tmp_path, words, message):
    words = ['-results', tmp_path / 'r.csv', *words]
    done = run_tool(weights, images, *words, check=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1
    assert not (tmp_path / 'r.csv').exists()


def test_without_scikit_learn_neighbours_alone_work(images, weights, tmp_path):
    (tmp_path / 'sklearn.py').write_text('raise ImportError("No module named sklearn")')
    words = ['-results', tmp_path / 'r.csv', '-k', 3]
    done = run_tool(weights, images, *words, check=False, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and 'requirements-dev.txt' in done.stderr and done.stderr.count('\n') == 1
    done = run_tool(weights, images, *words, '-methods', 'knn', PYTHONPATH=str(tmp_path))
    assert 'knn k=3: top-1' in done.stdout


def test_options_of_the_model_reach_the_features(images, weights, tmp_path):
    """Another image size, by its flag."""
    done = run_tool(weights, images, '-methods', 'knn', '-k', 3, '-image_size', 32, '-results',
                    tmp_path / 'r.csv', *options(['DATA.EVAL_LIST', 'train_list.txt']))
    assert '(20 images, 20 training images, 32 features)' in done.stdout
    assert ',32,1.0,' in (tmp_path / 'r.csv').read_text()
