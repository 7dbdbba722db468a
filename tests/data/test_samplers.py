"""data/samplers.py: the order of samples, for any number of processes and any start."""
import collections

import numpy as np
import pytest

from data.samplers import EvalSampler, TrainSampler, balanced_order, repeated_order


def train_batches(num_samples, batch_size, world, epoch=0, seed=0, start=0):
    """[rank][k] -> [index, ...]"""
    samplers = [TrainSampler(num_samples, batch_size, seed, rank, world) for rank in range(world)]
    batches = [list(sampler.batches(epoch, start)) for sampler in samplers]
    assert all(name[0] == epoch for rank in batches for batch in rank for name in batch)
    assert all(len(rank) == len(sampler) - start for rank, sampler in zip(batches, samplers))
    return [[[index for _, index in batch] for batch in rank] for rank in batches]


@pytest.mark.parametrize('world', [1, 2, 4])
def test_training_order_does_not_depend_on_the_processes(world):
    ranks = train_batches(103, 8 // world, world)
    order = [index for step in zip(*ranks) for batch in step for index in batch]
    assert len(order) == 96 and len(set(order)) == 96 and set(order) <= set(range(103))
    assert order == [index for batch in train_batches(103, 8, 1)[0] for index in batch]
    assert order != sorted(order)


def test_training_order_is_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): str(train_batches(50, 5, 1, epoch, seed)) for seed in (0, 1) for epoch in (0, 1)}
    np.random.seed(1)
    assert len(set(orders.values())) == 4
    assert orders[1, 1] == str(train_batches(50, 5, 1, 1, 1))


def test_all_samples_occur_over_the_epochs():
    seen = set()
    for epoch in range(6):                                    # each epoch leaves out another tail
        for rank in train_batches(11, 4, 2, epoch):
            seen.update(*rank)
    assert len(seen) == 11


@pytest.mark.parametrize('repeats, num_samples, step_size',
                         [(3, 96, 24), (3, 103, 16), (2, 50, 7), (4, 9, 64)])
def test_repeated_order_keeps_copies_in_one_step(repeats, num_samples, step_size):
    order = repeated_order(num_samples, repeats, step_size, np.random.default_rng(0))
    images, copies = order % num_samples, order // num_samples
    assert len(order) == num_samples and len(set(order)) == num_samples and copies.max() == repeats - 1
    counts = collections.Counter(images)
    # others have their turn in other epochs
    assert len(counts) == -(-num_samples // repeats)
    # the end may cut one short
    assert sorted(counts.values())[1:] == [repeats] * (len(counts) - 1)
    steps = [images[first:first + step_size] for first in range(0, num_samples, step_size)]
    parted = sum(len({*step} & {*following}) for step, following in zip(steps, steps[1:]))
    # at most one image at each step's end
    assert parted <= len(steps) - 1
    for first in range(0, num_samples, step_size):
        # all first copies, then all second, ...
        assert (np.diff(copies[first:first + step_size]) >= 0).all()
        distinct = images[first:first + step_size][copies[first:first + step_size] == 0]
        assert len({*distinct}) == len(distinct)


def test_training_starts_at_any_batch():
    assert train_batches(40, 3, 2, start=4)[1] == train_batches(40, 3, 2)[1][4:]


def test_list_too_short_for_one_batch_is_refused():
    message = '15 training images do not fill one batch of 8 on each of 2 .*DATA.BATCH_SIZE to 7'
    with pytest.raises(ValueError, match=message):
        TrainSampler(15, 8, seed=0, rank=0, world=2)
    assert len(TrainSampler(16, 8, seed=0, rank=0, world=2)) == 1


@pytest.mark.parametrize('num_samples, world', [(23, 1), (23, 2), (23, 4), (3, 5)])
def test_evaluation_takes_each_sample_once(num_samples, world):
    samplers = [EvalSampler(num_samples, 4, rank, world) for rank in range(world)]
    batches = [[[index for _, index in batch] for batch in sampler.batches(0)] for sampler in samplers]
    assert sorted(sum((batch for rank in batches for batch in rank), [])) == list(range(num_samples))
    for rank, (sampler, own) in enumerate(zip(samplers, batches)):
        assert len(sampler) == len(own) and all(len(batch) == 4 for batch in own[:-1])
        assert sum(own, []) == list(range(rank, num_samples, world))
        assert [[index for _, index in batch] for batch in sampler.batches(0, start=1)] == own[1:]


# ---- balanced classes

LABELS = np.repeat([0, 1, 3], [80, 15, 5])          # class 2 has no image
ROOT = 80 ** 0.5 + 15 ** 0.5 + 5 ** 0.5


@pytest.mark.parametrize('balance, expected', [
    (1.0, [100 / 3, 100 / 3, 0, 100 / 3]), (0.0, [80, 15, 0, 5]),
    (0.5, [100 * 80 ** 0.5 / ROOT, 100 * 15 ** 0.5 / ROOT, 0, 100 * 5 ** 0.5 / ROOT])])
def test_balanced_order_has_the_shares_of_the_classes(balance, expected):
    order = balanced_order(LABELS, balance, np.random.default_rng(0))
    assert len(order) == len(set(order.tolist())) == 100
    assert np.abs(np.bincount(LABELS[order % 100], minlength=4) - expected).max() <= 1
    assert order.tolist() != sorted(order.tolist())
    for label in (0, 1, 3):                         # no image has two copies more than another
        times = collections.Counter((order % 100)[LABELS[order % 100] == label].tolist())
        images = np.flatnonzero(LABELS == label).tolist()
        counts = [times[image] for image in images]
        assert max(counts) - min(counts) <= 1
        copies = collections.defaultdict(list)
        for index in order.tolist():
            copies[index % 100].append(index // 100)
        assert all(sorted(copies[image]) == list(range(times[image])) for image in images)


def test_all_images_of_a_large_class_occur_over_the_epochs():
    sampler = TrainSampler(100, 10, 0, balance=1.0, labels=LABELS)
    seen = {index % 100 for epoch in range(12) for batch in sampler.batches(epoch) for _, index in batch}
    assert seen == set(range(100))


@pytest.mark.parametrize('world, accum', [(1, 2), (2, 1), (4, 3)])
def test_balanced_order_does_not_depend_on_how_a_step_is_split(world, accum):
    def order(world, accum, start=0):
        samplers = [TrainSampler(100, 8 // world, 0, rank, world, accum=accum, balance=0.7, labels=LABELS)
                    for rank in range(world)]
        ranks = [list(sampler.batches(3, start)) for sampler in samplers]
        return [name for step in zip(*ranks) for batch in step for name in batch]
    assert order(world, accum) == order(1, 1) and order(world, accum, 5) == order(1, 1)[5 * 8:]
