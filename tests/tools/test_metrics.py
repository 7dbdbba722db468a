"""tools/metrics.py: scores of saved predictions, equal to scikit-learn's, and the temperature."""
import csv
import json
import math

import numpy as np
import paddle
import pytest
from runs import TINY, options, program
from scipy.optimize import minimize_scalar
from sklearn import metrics

from reporting import scores
from training import records
from training.calibration import TemperatureSearch, best_temperature


def drawn(count, classes, seed=0, temperature=1.0):
    """Labels (N,), logits (N, K) that are right in half of the cases."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes - 1, count)             # the last class has no image
    logits = random.standard_normal((count, classes)) * 1.5
    logits[np.arange(count), labels] += 2
    return labels, (logits * temperature).astype('float32')


def softmax(logits):
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def predictions_of(labels, logits):
    probabilities = softmax(logits)
    top1 = probabilities.argmax(axis=1)
    rows = np.arange(len(labels))
    return {'index': rows, 'label': labels, 'top1': top1, 'probability': probabilities[rows, top1],
            'label_probability': probabilities[rows, labels]}


@pytest.mark.parametrize('count, classes', [(1, 3), (7, 5), (500, 10), (3000, 200)])
def test_scores_equal_those_of_scikit_learn(count, classes):
    labels, logits = drawn(count, classes)
    judged = predictions_of(labels, logits)
    found = scores.judge(judged, classes)
    every = range(classes)
    expected = metrics.precision_recall_fscore_support(labels, judged['top1'], labels=every, zero_division=0)
    for ours, theirs in zip((found.precision, found.recall, found.f1, found.support), expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    confusion = metrics.confusion_matrix(labels, judged['top1'], labels=every)
    np.testing.assert_array_equal(found.confusion, confusion)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, judged['top1']))
    recalls = metrics.recall_score(labels, judged['top1'], average=None, labels=np.unique(labels))
    assert found.balanced_accuracy == pytest.approx(recalls.mean())
    for average in ('macro', 'weighted'):
        expected = metrics.precision_recall_fscore_support(labels, judged['top1'], average=average,
                                                           zero_division=0)
        for name, value in zip(('precision', 'recall', 'f1'), expected):
            assert found.mean(name, average == 'weighted') == pytest.approx(value, abs=1e-12)


def test_calibration_error_by_its_definition():
    labels, logits = drawn(2000, 10)
    judged = predictions_of(labels, logits)
    found = scores.judge(judged, 10)
    error, low = 0.0, 0.0
    for high in np.arange(1, scores.BINS + 1) / scores.BINS:
        inside = (judged['probability'] > low) & (judged['probability'] <= high)
        if inside.any():
            right = (judged['label'] == judged['top1'])[inside].mean()
            error += inside.mean() * abs(right - judged['probability'][inside].mean())
        low = high
    assert 0 < error == pytest.approx(found.calibration_error, abs=1e-6)


@pytest.mark.parametrize('temperature', [0.3, 1.0, 4.0])
def test_temperature_has_the_lowest_loss(temperature):
    """The oracle is a search by SciPy over the logits of all batches together."""
    labels, logits = drawn(600, 10, temperature=temperature)

    def loss(logarithm):
        probabilities = softmax(logits.astype('float64') / math.exp(logarithm))
        return -np.log(probabilities[np.arange(len(labels)), labels]).mean()

    expected = math.exp(minimize_scalar(loss, bounds=(-3, 3), method='bounded').x)
    search = TemperatureSearch()
    for part in (slice(0, 250), slice(250, 600)):
        search.add(paddle.to_tensor(labels[part]), paddle.to_tensor(logits[part]))
    assert best_temperature(search.sums.numpy()) == pytest.approx(expected, rel=2e-3)


def test_temperature_that_does_not_exist_is_unknown():
    labels = paddle.to_tensor([0, 1, 2])
    search = TemperatureSearch()
    search.add(labels, 100.0 * paddle.eye(3))       # all right: the sharper, the better
    assert math.isnan(best_temperature(search.sums.numpy()))


def test_training_writes_the_scores_and_the_tool_repeats_them(images, tmp_path):
    run = tmp_path / 'run'
    program('main_single_gpu.py', '-data_path', images, '-output', run, *options(TINY))
    names = ['metrics_val.json', 'classes_val.csv', 'confusion_val.csv']
    written = [(run / name).read_bytes() for name in names]
    (tmp_path / 'names.txt').write_text('red\ngreen, light\nblue\nnone\n')
    done = program('tools/metrics.py', run, '-output', tmp_path / 'out')
    assert [(tmp_path / 'out' / name).read_bytes() for name in names] == written
    found = json.loads(written[0])
    last = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()][-1]
    assert 100 * found['accuracy'] == pytest.approx(last['acc1'], abs=1e-3)
    assert f'accuracy                    {found["accuracy"]}' in done.stdout and found['temperature'] != 1
    program('tools/metrics.py', run, '-output', tmp_path / 'out', '-classes', tmp_path / 'names.txt')
    with open(tmp_path / 'out' / 'classes_val.csv', encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['class'] for row in rows] == ['red', 'green, light', 'blue', 'none']
    with open(tmp_path / 'out' / 'confusion_val.csv', encoding='utf-8', newline='') as file:
        assert sum(int(row['images']) for row in csv.DictReader(file)) == found['images']
    assert 'expected calibration error' in (run / 'report.html').read_text()


def test_run_of_an_earlier_version_has_no_temperature(tmp_path):
    labels, logits = drawn(50, 4)
    judged = predictions_of(labels, logits)
    names = ('index', 'label', 'top1', 'probability', 'label_probability')
    (tmp_path / 'config.yaml').write_text('MODEL: {NUM_CLASSES: 4}\n')
    np.savez(tmp_path / 'predictions_val.npz', **{name: judged[name] for name in names})
    done = program('tools/metrics.py', tmp_path)
    assert 'temperature                 unknown' in done.stdout
    assert json.loads((tmp_path / 'metrics_val.json').read_text())['temperature'] is None


def test_run_without_predictions_is_refused(tmp_path):
    (tmp_path / 'config.yaml').write_text('MODEL: {NUM_CLASSES: 4}\n')
    done = program('tools/metrics.py', tmp_path, check=False)
    assert done.returncode == 2 and 'no predictions' in done.stderr and done.stderr.count('\n') == 1
    done = program('tools/metrics.py', tmp_path / 'none', check=False)
    assert done.returncode == 2 and 'no run folder' in done.stderr


def test_temperature_is_that_of_all_processes(tmp_path, monkeypatch):
    """What rank 1 has summed counts as well."""
    labels, logits = drawn(300, 5)
    parts = []
    for part in (slice(0, 100), slice(100, 300), slice(0, 300)):
        search = TemperatureSearch()
        search.add(paddle.to_tensor(labels[part]), paddle.to_tensor(logits[part]))
        parts.append(search.sums.numpy())
    kept = records.Predictions(str(tmp_path))
    kept.add(np.arange(100), paddle.to_tensor(labels[:100]), paddle.to_tensor(logits[:100]))
    monkeypatch.setattr(records.utils, 'gather', lambda value: [value, parts[1]])
    kept.save('val')
    with np.load(tmp_path / 'predictions_val.npz') as file:
        assert file['temperature'] == pytest.approx(best_temperature(parts[2]), rel=1e-9)
