"""-pretrained from end to end: every format, both weights of a checkpoint, fine-tuning, the hub."""
import json

import numpy as np
import paddle
import pytest
from hub_server import Hub, environment
from runs import TINY, make_images, options, program, records
from safetensors.numpy import save, save_file
from torch_files import Named, Ref, write_legacy, write_zip

from config import get_config
from halonet import build_halonet
from model import weights
from training import checkpoint, engine


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images') / 'data')


def run(images, output, *opts):
    return engine.run(get_config(None, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(output), *opts]))


def evaluate(images, output, path, *opts):
    result = run(images, output, 'EVAL', True, 'MODEL.PRETRAINED', str(path), *opts)['val']
    return result['acc1'], result['loss']


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    """The folder of a run of two epochs with averaged weights, unlike the raw ones."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    run(images, folder, 'TRAIN.EMA_DECAY', 0.5, 'TRAIN.BASE_LR', 0.01)
    return folder


@pytest.fixture(scope='module')
def timm_state(trained):
    """The final weights under timm's names, with a counter of batches as timm's files have them."""
    state = weights.to_timm(weights.read(str(trained / 'final.pdparams')))
    state = {key: np.ascontiguousarray(array) for key, array in state.items()}
    return {**state, 'stem.conv1.bn.num_batches_tracked': np.array(5)}


def as_torch(state, extra=()):
    """A state dict as torch.save pickles it, and its storages."""
    kinds, content, storages = {'f': 'FloatStorage', 'i': 'LongStorage'}, {}, {}
    for key, array in state.items():
        name, strides = str(len(storages)), tuple(step // array.itemsize for step in array.strides)
        storage = Ref(('storage', Named('torch', kinds[array.dtype.kind]), name, 'cpu', array.size, *extra))
        content[key] = Named(
            'torch._utils', '_rebuild_tensor_v2', (storage, 0, array.shape, strides, False, {})
        )
        storages[name] = array
    return content, storages


def write_pth(path, state):
    content, storages = as_torch(state)
    write_zip(path, content, {name: array.tobytes() for name, array in storages.items()})


def write_old_pth(path, state):
    content, storages = as_torch(state, extra=(None,))
    write_legacy(path, content, {name: array.reshape(-1) for name, array in storages.items()})


WRITERS = {
    'safetensors': lambda path, state: save_file(state, path),
    'pth': write_pth,
    'old pth': write_old_pth,
    'checkpoint of timm': lambda path, state: write_pth_checkpoint(path, state),
    'checkpoint of Paddle': lambda path, state: write_nested(path, state),
}


def write_pth_checkpoint(path, state):
    content, storages = as_torch({f'module.{key}': array for key, array in state.items()})
    write_zip(
        path,
        {'epoch': 3, 'state_dict': content, 'optimizer': {'state': {}, 'param_groups': [{'lr': 0.1}]}},
        {name: array.tobytes() for name, array in storages.items()},
    )


def write_nested(path, state):
    """As PaddleViT's newer scripts write them, from a model in another one."""
    tensors = {f'model.backbone.{key}': paddle.to_tensor(array) for key, array in state.items()}
    paddle.save(
        {
            'model': tensors,
            'epoch': 3,
            'optimizer': {'LR_Scheduler': {'last_lr': 0.1}},
            'best': np.float32(1),
        },
        str(path),
    )


@pytest.mark.parametrize('kind', WRITERS)
def test_every_format_gives_the_same_evaluation(images, trained, timm_state, tmp_path, kind):
    path = tmp_path / 'weights'
    WRITERS[kind](path, timm_state)
    last = records(trained, 'val')[-1]
    assert evaluate(images, tmp_path / 'run', path) == (
        pytest.approx(last['acc1']),
        pytest.approx(last['loss'], rel=1e-6),
    )


def test_raw_or_averaged_weights_of_a_checkpoint_are_evaluated(images, trained, tmp_path):
    path = checkpoint.steps(trained)[0]
    raw, averaged = records(trained, 'val')[-1], records(trained, 'val_ema')[-1]
    assert abs(raw['loss'] - averaged['loss']) > 1e-3
    assert evaluate(images, tmp_path / 'raw', path)[1] == pytest.approx(raw['loss'], rel=1e-6)
    assert 'taking the weights; MODEL.PRETRAINED_EMA True' in (tmp_path / 'raw' / 'log.txt').read_text()
    assert evaluate(images, tmp_path / 'ema', path, 'MODEL.PRETRAINED_EMA', True)[1] == pytest.approx(
        averaged['loss'], rel=1e-6
    )
    with pytest.raises(ValueError, match='holds no moving average'):
        evaluate(images, tmp_path / 'no', trained / 'final.pdparams', 'MODEL.PRETRAINED_EMA', True)


def test_file_with_more_numbers_than_the_model_is_refused(tmp_path):
    """A sparse file of 16 GB, and a real one with a classifier of more classes, which is."""
    model = build_halonet(get_config(None, [*TINY, 'MODEL.NUM_CLASSES', 0]))
    header = json.dumps({'stem.a': {'dtype': 'F32', 'shape': [2**32], 'data_offsets': [0, 2**34]}}).encode()
    with open(tmp_path / 'sparse', 'wb') as file:
        file.write(len(header).to_bytes(8, 'little') + header)
        file.truncate(8 + len(header) + 2 ** 34)
    with pytest.raises(
        ValueError, match=r'sparse: .*stem\.a: its arrays take more than 256 MB, too much for the model'
    ):
        weights.load_pretrained(model, str(tmp_path / 'sparse'))
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    save_file({**state, 'head.fc.weight': np.zeros((32, 100_000), 'float32')}, tmp_path / 'more')
    weights.load_pretrained(model, str(tmp_path / 'more'))


# ---- fine-tuning

def test_fine_tuning_with_other_classes_and_another_window(images, trained, timm_state, tmp_path):
    """From 4 classes to 7 with a wider halo: changes are logged, training learns, evaluation is strict."""
    save_file(timm_state, tmp_path / 'a.safetensors')
    changes = ['MODEL.NUM_CLASSES', 7, 'MODEL.HALO_SIZE', 2]
    results = run(images, tmp_path / 'run', 'MODEL.PRETRAINED', str(tmp_path / 'a.safetensors'), *changes,
                  'TRAIN.NUM_EPOCHS', 12, 'TRAIN.BASE_LR', 0.01, 'TRAIN.CROP_SCALE', [0.8, 1.0])
    log = (tmp_path / 'run' / 'log.txt').read_text()
    assert 'fresh head for 7 classes: the weights have one for 4' in log
    assert log.count('interpolated from a window of 6 pixels to one of 8') == 2
    assert results['val']['acc1'] > 80
    final = weights.read(str(tmp_path / 'run' / 'final.pdparams'))
    assert final['head.fc.weight'].shape == (32, 7) and final[
        'stages.1.0.self_attn.pos_embed.height_rel'
    ].shape == (15, 4)
    with pytest.raises(ValueError, match=r'head\.fc\.weight: \[32, 4\] in the file, \[32, 7\] in the model'):
        evaluate(images, tmp_path / 'strict', tmp_path / 'a.safetensors', *changes)


def test_fine_tuning_starts_from_the_pretrained_weights(images, trained, timm_state, tmp_path):
    """At a tiny learning rate all but the fresh head stays, and the average starts there too."""
    write_pth(tmp_path / 'a.pth', timm_state)
    run(
        images,
        tmp_path / 'run',
        'MODEL.PRETRAINED',
        str(tmp_path / 'a.pth'),
        'MODEL.NUM_CLASSES',
        5,
        'TRAIN.EMA_DECAY',
        0.9,
        'TRAIN.BASE_LR',
        1e-12,
        'TRAIN.WARMUP_LR',
        0.0,
        'TRAIN.END_LR',
        0.0,
        'MODEL.FREEZE_NORM',
        True,
        'TRAIN.NUM_EPOCHS',
        1,
        'TRAIN.WARMUP_EPOCHS',
        0,
    )
    before = weights.to_ours(timm_state)
    paddle.seed(0)
    head = build_halonet(get_config(None, [*TINY, 'MODEL.NUM_CLASSES', 5])).state_dict()
    for name in ('final', 'final_ema'):
        after = weights.read(str(tmp_path / 'run' / f'{name}.pdparams'))
        for key, array in after.items():
            expected = head[key].numpy() if key.startswith('head.fc.') else before[key]
            np.testing.assert_allclose(array, expected, atol=1e-9, err_msg=f'{name} {key}')


def test_two_processes_download_a_hub_model_once(images, trained, timm_state, tmp_path):
    with Hub({'timm/tiny.a1h_in1k': {'model.safetensors': save(timm_state)}}) as server:
        done = program(
            'main_multi_gpu.py',
            '-data_path',
            images,
            '-output',
            tmp_path / 'run',
            '-nprocs',
            2,
            '-eval',
            '-pretrained',
            'timm/tiny.a1h_in1k',
            *options(TINY),
            **environment(tmp_path / 'home', server.url),
        )
        assert server.asked['GET', '/timm/tiny.a1h_in1k/resolve/main/model.safetensors'] == 1
    last = records(trained, 'val')[-1]
    assert done.stdout.splitlines()[-1] == (
        f'val  acc@1 {last["acc1"]:.2f}  acc@5 {last["acc5"]:.2f}  loss {last["loss"]:.4f}  (11 images)'
    )
