"""The models of configs/ against published facts: timm's numbers, the paper's sizes, docs/models.md."""
import math

import numpy as np
import paddle
import pytest
import reference as ref
from paddle import nn

from config import get_config
from dev import model_table
from halonet import build_halonet, count_parameters
from training import macs

PUBLISHED = model_table.published()[0]
TIMM = {  # config -> name in timm, side of the images, parameters
    'halonet_26t_256': ('halonet26t', 256, 12_480_288),
    'halonet_50ts_256': ('halonet50ts', 256, 22_733_280),
    'sehalonet_33ts_256': ('sehalonet33ts', 256, 13_691_712),
    'eca_halonext_26ts_256': ('eca_halonext26ts', 256, 10_756_885),
    'haloregnetz_b_224': ('haloregnetz_b', 224, 11_680_072),
    'halonet_h1_timm_256': ('halonet_h1', 256, 8_100_056),
    'halo2botnet_50ts_256': ('halo2botnet50ts_256', 256, 22_635_360),
    'lamhalobotnet_50ts_256': ('lamhalobotnet50ts_256', 256, 22_569_824),
}
PAPER = {  # b, h, r_v, r_b, l_3, s, d_f
    'halonet_h0': (8, 3, 1, 0.5, 7, 256, 0), 'halonet_h1': (8, 3, 1, 1.0, 10, 256, 0),
    'halonet_h2': (8, 3, 1, 1.25, 11, 256, 0), 'halonet_h3': (10, 3, 1, 1.5, 12, 320, 1024),
    'halonet_h4': (12, 2, 1, 3, 12, 384, 1280), 'halonet_h5': (14, 2, 2.5, 2, 23, 448, 1536),
    'halonet_h6': (8, 4, 3, 2.75, 24, 512, 1536),
    'halonet_h7': (10, 3, 4, 3.5, 26, 600, 2048),
}
CONFIGS = {config.MODEL.NAME: config for config in model_table.model_configs().values()}


def build(name):
    return build_halonet(get_config(f'configs/{name}.yaml'))


def shapes_only(config):
    with paddle.LazyGuard():
        return build_halonet(config)


@pytest.fixture(autouse=True)
def repo_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


# ---- timm's figures

@pytest.mark.parametrize('name', TIMM)
def test_same_network_as_timm(name):
    timm_name, side, parameters = TIMM[name]
    model = build(name)
    keys = ref.timm_keys(timm_name)
    shapes = {ref.timm_key(key): list(tensor.shape) for key, tensor in model.state_dict().items()}
    shapes['head.fc.weight'].reverse()
    assert shapes == keys
    assert count_parameters(model) == parameters
    assert sum(math.prod(shape) for key, shape in keys.items() if 'running' not in key) == parameters

    expected = ref.timm_logits(f'{timm_name}.{side}x{side}')
    images = ref.seeded_images((2, 3, side, side))
    ref.fill_seeded(model).eval()
    # 19 sharp attentions in a row: timm's float32 misses its float64 by 1.3e-4
    if (
        name == 'halonet_h1_timm_256'
    ):
        assert np.abs(expected - ref.timm_h1_float64()).max() < 3e-4 * expected.std()
        assert np.abs(ref.run(model, images[:1]) - ref.timm_h1_float64()[:1]).max() < 3e-4 * expected.std()
        expected, images = ref.timm_h1_float64()[:1], images[:1].astype('float64')
        model.to(dtype='float64')
    logits = ref.run(model, images)
    assert np.abs(logits - expected).max() < (5e-5 if logits.dtype == np.float32 else 1e-8) * expected.std()


@pytest.mark.parametrize('name', [name for name, facts in PUBLISHED.items() if 'gmacs' in facts])
def test_multiply_adds_agree_with_published_ones(name):
    side = CONFIGS[name].DATA.IMAGE_SIZE
    count = macs.total_multiply_adds(shapes_only(CONFIGS[name]), side, side) / 1e9
    assert count == pytest.approx(PUBLISHED[name]['gmacs'], rel=0.02)


def test_every_timm_model_has_published_results():
    named = {
        facts['weights'][0].partition('/')[2].partition('.')[0]
        for facts in PUBLISHED.values()
        if 'weights' in facts
    }
    assert named | {'halonet_h1'} == {timm_name for timm_name, _, _ in TIMM.values()}
    with np.load(ref.FIXTURES / 'timm_logits.npz') as file:
        assert {key.split('.')[0] for key in file.files} == {timm_name for timm_name, _, _ in TIMM.values()}


# ---- the paper's

@pytest.mark.parametrize('name', PAPER)
def test_paper_sizes(name):
    b, h, r_v, r_b, l_3, s, d_f = PAPER[name]
    config, model = CONFIGS[name], CONFIGS[name].MODEL
    base = [64, 128, 256, 512]
    assert (
        model.BLOCK_SIZE, model.HALO_SIZE, model.VALUE_RATIO, config.DATA.IMAGE_SIZE, model.HEAD_WIDTH,
    ) == (b, h, r_v, s, d_f)
    assert (model.INNER_WIDTHS, model.WIDTHS, model.HEADS) == (
        base, [r_b * width for width in base], [4, 8, 8, 8],
    )
    network = shapes_only(config)
    assert [len(stage) for stage in network.stages] == [3, 3, l_3, 3]
    assert count_parameters(network) == pytest.approx(1e6 * PUBLISHED[name]['params_m'], rel=0.01)


@pytest.mark.parametrize('conv_stages', [1, 2, 3])
def test_paper_hybrids_are_h7_with_convolutions_in_the_first_stages(conv_stages):
    hybrid, whole = CONFIGS['halonet_h7_conv' + '123'[:conv_stages]], CONFIGS['halonet_h7']
    differing = {key for key in whole.MODEL if hybrid.MODEL[key] != whole.MODEL[key]}
    assert differing == {'NAME', 'STAGES', 'HEADS'} and hybrid.DATA == whole.DATA
    for i, (stage, halos) in enumerate(zip(shapes_only(hybrid).stages, shapes_only(whole).stages)):
        assert len(stage) == len(halos)
        assert {block.spatial[0] for block in stage} == {'conv2_kxk' if i < conv_stages else 'self_attn'}


def test_largest_of_the_family_runs():
    """600 px do not divide into blocks after stage 1: sides of 150, 75, 38 and 19 pixels, blocks of 10."""
    config = get_config(
        'configs/halonet_h7_600.yaml',
        [
            'MODEL.STAGES', ['halo'] * 4, 'MODEL.WIDTHS', [32, 64, 64, 64], 'MODEL.INNER_WIDTHS',
            [8, 16, 16, 16], 'MODEL.HEAD_WIDTH', 0,
        ],
    )
    model = build_halonet(config).eval()
    with paddle.no_grad():
        maps = model.features(paddle.to_tensor(ref.seeded_images((1, 3, 600, 600))))
    assert [list(x.shape[2:]) for x in maps] == [[side, side] for side in (150, 75, 38, 19)]
    assert all(np.isfinite(x.numpy()).all() for x in maps)


# ---- fresh weights

def expected_deviation(name, layer):
    """As in timm: projections of attention N(0, 1 / fan in), positions of a lambda N(0, 1 / head),
    convolutions N(0, 2 / fan out)."""
    shape = layer.weight.shape
    if name.rpartition('.')[2] in ('q', 'kv', 'qkv'):
        return shape[1] ** -0.5
    if isinstance(layer, nn.Conv3D):
        return shape[0] ** -0.5
    if isinstance(layer, nn.Linear):
        return 0.01
    return (2 * layer._groups / (shape[0] * shape[2] * shape[3])) ** 0.5


@pytest.mark.parametrize('name', ['haloregnetz_b_224', 'lamhalobotnet_50ts_256', 'eca_halonext_26ts_256'])
def test_initialisation(name):
    model = build(name)
    for key, layer in model.named_sublayers():
        # PyTorch's default: uniform in +- fan in ** -0.5, in the next line too
        if isinstance(
            layer, nn.Conv1D
        ):
            assert 0 < np.abs(layer.weight.numpy()).max() <= layer.weight.size ** -0.5
        elif isinstance(layer, (nn.Conv2D, nn.Conv3D, nn.Linear)):
            value, std = layer.weight.numpy().astype('float64'), expected_deviation(key, layer)
            assert value.std() == pytest.approx(std, rel=5 / (2 * value.size) ** 0.5), key
            assert abs(value.mean()) < 5 * std / value.size ** 0.5, key
            if layer.bias is not None:
                assert np.abs(layer.bias.numpy()).max() <= (1 / 13 if isinstance(layer, nn.Conv3D) else 0), (
                    key
                )
        elif isinstance(layer, nn.BatchNorm2D) and not key.endswith('conv3_1x1.bn'):
            assert (layer.weight.numpy() == 1).all() and (layer.bias.numpy() == 0).all(), key


def test_new_blocks_with_a_shortcut_return_it():
    model = build_halonet(CONFIGS['haloregnetz_b'])
    for stage in model.stages:
        for i, block in enumerate(stage):
            assert (block.conv3_1x1.bn.weight.numpy() == (i == 0)).all()
    x = paddle.randn([2, 32, 14, 14])
    block = model.stages[0][0].eval()
    assert list(block(x).shape) == [2, 48, 7, 7] and block(x).abs().max() > 0


# ---- docs/models.md

def test_page_of_models_is_up_to_date():
    assert model_table.PAGE.read_text(encoding='utf-8') == model_table.page(), 'run python dev/model_table.py'


def test_page_of_models_has_every_model():
    rows = [
        line.split('|')
        for line in model_table.PAGE.read_text(encoding='utf-8').splitlines()
        if line.startswith('| ')
    ][1:]
    names = [row[1].strip() for row in rows]
    files = sorted(
        path.name for path in model_table.ROOT.glob('configs/*.yaml') if not path.name.startswith('_')
    )
    assert sorted(row[9].strip(' `') for row in rows) == [f'configs/{name}' for name in files]
    assert sorted(names) == sorted({*names}) == sorted(CONFIGS) == sorted(PUBLISHED)


@pytest.mark.parametrize('name', ['halonet_26t', 'haloregnetz_b', 'lamhalobotnet_50ts'])
def test_counted_sizes_are_those_of_the_feature_maps(name):
    """The counter uses sides only. The model runs on sides that nothing divides for the real ones."""
    model = build_halonet(CONFIGS[name]).eval()
    images = paddle.zeros([1, 3, 201, 119])
    with paddle.no_grad():
        maps = [list(x.shape[2:]) for x in model.features(images)]
    counted, (H, W) = [], macs.multiply_adds(model.stem, 201, 119)[1:]
    for stage in model.stages:
        _, H, W = macs.multiply_adds(stage, H, W)
        counted.append([H, W])
    assert maps == counted
