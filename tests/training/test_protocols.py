"""Evaluations on a subset of the classes and with several right labels, against plain loops in numpy."""
import csv
import json
import math
import shutil

import numpy as np
import paddle
import pytest
from runs import TINY, options, program

import datasets
from config import get_config
from data.protocol import Protocol
from halonet import build_halonet
from training import engine
from training.judging import Judge, best_right_label

CLASSES = 9                                         # of the model; the images have labels 0 to 3
SUBSET = [7, 2, 5, 0]
OPTS = [*TINY, 'MODEL.NUM_CLASSES', CLASSES]


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'w.pdparams'
    paddle.seed(3)
    model = build_halonet(get_config(None, OPTS))
    model.head.fc.weight.set_value(model.head.fc.weight * 200)      # logits that differ
    paddle.save(model.state_dict(), str(path))
    return str(path)


@pytest.fixture(scope='module')
def logits(images, weights):
    """(11, CLASSES), in the order of the list."""
    config = get_config(None, [*OPTS, 'DATA.DATA_PATH', images])
    model = build_halonet(config)
    model.set_state_dict(paddle.load(weights))
    model.eval()
    rows = []
    for pixels, _, _ in datasets.build_eval(config).epoch(0):
        with paddle.no_grad():
            rows.append(model(datasets.normalise(pixels, config.DATA.MEAN, config.DATA.STD)).numpy())
    return np.concatenate(rows).astype('float64')


@pytest.fixture
def files(tmp_path):
    """The two files, and the right labels of each image."""
    random = np.random.default_rng(1)
    right = [sorted(random.choice(CLASSES, size, replace=False).tolist())
             for size in (1, 2, 0, 3, 1, 0, 4, 1, 2, 5, 1)]
    (tmp_path / 'classes.txt').write_text(''.join(f'{label}\n' for label in SUBSET))
    named = {f'val/{i}.png': labels for i, labels in enumerate(right)}
    (tmp_path / 'labels.json').write_text(json.dumps(named))
    return str(tmp_path / 'classes.txt'), str(tmp_path / 'labels.json'), right


def evaluate(images, weights, output, *opts):
    opts = ['DATA.DATA_PATH', images, 'EVAL', True, 'MODEL.PRETRAINED', weights, 'OUTPUT', str(output), *opts]
    return engine.run(get_config(None, [*OPTS, *opts]))['val']


def judged(logits, right):
    """Accuracies in percent and loss of images with several right labels each, by a plain loop."""
    top1, top5, losses = [], [], []
    for row, labels in zip(logits, right):
        ranked = sorted(range(len(row)), key=lambda label: -row[label])
        top1.append(ranked[0] in labels)
        top5.append(any(label in labels for label in ranked[:5]))
        losses.append(math.log(np.exp(row).sum()) - max(row[label] for label in labels))
    return 100 * np.mean(top1), 100 * np.mean(top5), np.mean(losses)


def same(result, expected):
    assert (result['acc1'], result['acc5']) == pytest.approx(expected[:2])
    assert result['loss'] == pytest.approx(expected[2], rel=1e-5)


def rows_of(folder):
    with open(folder / 'results.csv', encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def test_subset_equals_logits_of_these_classes_alone(images, weights, logits, files, tmp_path):
    labels = [i % 4 for i in range(11)]             # of the list
    result = evaluate(images, weights, tmp_path / 'run', 'DATA.EVAL_CLASSES', files[0])
    same(result, judged(logits[:, SUBSET], [[label] for label in labels]))
    assert result['images'] == 11 and result['acc5'] == 100         # there are four classes
    with np.load(tmp_path / 'run' / 'predictions_eval.npz') as found:
        best = logits[:, SUBSET].argmax(axis=1)
        np.testing.assert_array_equal(found['top1'], np.array(SUBSET)[best])
        np.testing.assert_array_equal(found['label'], np.array(SUBSET)[labels])
        parts = np.exp(logits[:, SUBSET])
        np.testing.assert_allclose(found['probability'], (parts / parts.sum(1, keepdims=True)).max(1), 1e-5)
    assert rows_of(tmp_path / 'run')[0]['data'] == f'{images} + {files[0]}'
    assert 'MODEL.NUM_CLASSES' not in (tmp_path / 'run' / 'log.txt').read_text()     # no advice to change it
    assert 'val_list.txt:' in (tmp_path / 'run' / 'report.html').read_text()         # pictures of errors


def test_several_right_labels(images, weights, logits, files, tmp_path):
    _, path, right = files
    result = evaluate(images, weights, tmp_path / 'run', 'DATA.EVAL_LABELS', path)
    kept = [i for i, labels in enumerate(right) if labels]
    expected = judged(logits[kept], [right[i] for i in kept])
    same(result, expected)
    assert result['images'] == 9 and 0 < expected[0] < 100
    assert '9 of 11 images have a right label' in (tmp_path / 'run' / 'log.txt').read_text()
    with np.load(tmp_path / 'run' / 'predictions_eval.npz') as found:
        assert found['index'].tolist() == kept
        assert 100 * (found['top1'] == found['label']).mean() == pytest.approx(expected[0])
        assert all(label in right[i] for i, label in zip(kept, found['label']))
    scores = json.loads((tmp_path / 'run' / 'metrics_eval.json').read_text())
    assert 100 * scores['accuracy'] == pytest.approx(expected[0], abs=1e-3)


def test_both_together(images, weights, logits, files, tmp_path):
    """The labels of the JSON file are those of the list, of which the subset has four."""
    classes, path, right = files
    right = [[label for label in labels if label < 4] for labels in right]
    (tmp_path / 'labels.json').write_text(json.dumps({f'{i}.png': labels for i, labels in enumerate(right)}))
    kept = [i for i, labels in enumerate(right) if labels]
    opts = ['DATA.EVAL_CLASSES', classes, 'DATA.EVAL_LABELS', path]
    result = evaluate(images, weights, tmp_path / 'run', *opts)
    same(result, judged(logits[kept][:, SUBSET], [right[i] for i in kept]))


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(images, weights, files, tmp_path):
    opts = ['DATA.EVAL_CLASSES', files[0], 'DATA.EVAL_LABELS', tmp_path / 'few.json']
    right = {f'{i}.png': [i % 4, (i + 1) % 4] if i % 5 else [] for i in range(11)}
    (tmp_path / 'few.json').write_text(json.dumps(right))
    words = ['-eval', '-pretrained', weights, '-data_path', images, *options([*OPTS, *opts])]
    program('main_single_gpu.py', '-output', tmp_path / 'one', *words)
    program('main_multi_gpu.py', '-nprocs', 2, '-output', tmp_path / 'two', *words)
    (one,), (two,) = rows_of(tmp_path / 'one'), rows_of(tmp_path / 'two')
    assert one['images'] == '8' and [one[key] for key in ('top1', 'top5', 'images')] == [
        two[key] for key in ('top1', 'top5', 'images')]
    assert float(one['loss']) == pytest.approx(float(two['loss']), abs=2e-5)
    with np.load(tmp_path / 'one/predictions_eval.npz') as first:
        with np.load(tmp_path / 'two/predictions_eval.npz') as second:
            for name in ('index', 'label', 'top1'):
                np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize('world', [1, 2, 3])
def test_each_image_with_a_right_label_is_on_one_rank(images, files, world):
    config = get_config(None, [*OPTS, 'DATA.DATA_PATH', images, 'DATA.EVAL_LABELS', files[1],
                               'DATA.BATCH_SIZE', 2])
    indices = [index for rank in range(world) for batch in datasets.build_eval(config, rank, world).epoch(0)
               for index in batch[2].tolist()]
    assert sorted(indices) == [i for i, labels in enumerate(files[2]) if labels]


def test_equal_logits_of_16_bits_are_judged_as_by_topk():
    """With AMP many logits are equal. An image is right if the first of topk is one of its labels."""
    random = np.random.default_rng(0)
    logits = paddle.to_tensor(random.integers(0, 3, (500, 7)).astype('float32'))
    right = np.sort(np.argsort(random.random((500, 7)), axis=1)[:, :3], axis=1)
    right[::3, 2] = -1
    found = best_right_label(logits, paddle.to_tensor(right)).numpy()
    top = logits.topk(5, axis=1)[1].numpy()
    for label, ranked, labels in zip(found, top, right):
        hits = [candidate for candidate in ranked if candidate in labels]
        assert label in labels and label >= 0
        assert not hits or label == hits[0]


def test_judge_without_a_protocol_changes_nothing():
    logits, labels = paddle.rand([2, 3]), paddle.to_tensor([0, 2])
    assert Judge(Protocol(), 3)(logits, labels, np.arange(2)) == (logits, labels)


def test_class_names_of_a_run_are_the_model_s(images, weights, files, tmp_path):
    """The data folder names the four classes of its labels. Names beside the weights decide."""
    data = tmp_path / 'data'
    shutil.copytree(images, data)
    (data / 'class_names.txt').write_text('red\ngreen\nblue\nnone\n')
    evaluate(str(data), weights, tmp_path / 'a', 'DATA.EVAL_CLASSES', files[0])
    names = (tmp_path / 'a' / 'class_names.txt').read_text().splitlines()
    assert [names[label] for label in SUBSET] == ['red', 'green', 'blue', 'none']
    assert names[1] == 'class 1' and len(names) == CLASSES
    shutil.copy(weights, tmp_path / 'w.pdparams')
    (tmp_path / 'class_names.txt').write_text(''.join(f'{name}\n' for name in 'abcdefghi'))
    evaluate(str(data), str(tmp_path / 'w'), tmp_path / 'b', 'DATA.EVAL_CLASSES', files[0])
    assert (tmp_path / 'b' / 'class_names.txt').read_text().split() == list('abcdefghi')
    assert 'differ' not in (tmp_path / 'b' / 'log.txt').read_text()
    assert (tmp_path / 'a' / 'metrics_eval.json').read_text()


def test_training_evaluates_by_the_protocol(images, files, tmp_path):
    """Every evaluation of a training follows it, and the last one is the evaluation of its weights."""
    opts = ['DATA.EVAL_LABELS', files[1]]
    config = get_config(None, [*OPTS, 'DATA.DATA_PATH', images, 'OUTPUT', str(tmp_path / 'run'), *opts])
    result = engine.run(config)['val']
    assert result['images'] == 9
    again = evaluate(images, str(tmp_path / 'run' / 'final'), tmp_path / 'eval', *opts)
    assert again['acc1'] == result['acc1'] and again['loss'] == pytest.approx(result['loss'], rel=1e-6)
