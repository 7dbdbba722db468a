"""The model as a backbone: images of any size, feature maps, freezing, recomputation, paddle.hub, exports."""
import numpy as np
import paddle
import pytest
import reference as ref
from paddle import nn

from config import get_config
from halonet import build_halonet
from model import weights
from model.attention import BottleneckAttention, halo_attention
from model.blocks import Bottleneck
from model.lambda_layer import LambdaLayer

MIXED = [
    'MODEL.STAGES', ['conv lambda', 'halo*2', 'halo bot'], 'MODEL.WIDTHS', [16, 32, 32], 'MODEL.STRIDES',
    [1, 2, 2], 'MODEL.HEADS', [2, 2, 2], 'MODEL.LAMBDA_SIZE', 5, 'DATA.IMAGE_SIZE', 64,
]


def build_tiny(*opts):
    return ref.fill_seeded(build_halonet(get_config(None, [*ref.TINY, *opts])))


# ---- any size

@pytest.mark.parametrize('height, width', [(32, 32), (64, 40), (37, 61), (5, 90), (1, 1)])
def test_any_size(height, width):
    model = build_tiny(*MIXED, 'DATA.IMAGE_SIZE', 96).eval()
    images = ref.seeded_images((2, 3, height, width))
    for info, maps in zip(model.feature_info, model.features(paddle.to_tensor(images))):
        assert list(maps.shape) == [
            2, info['width'], -(-height // info['stride']), -(-width // info['stride']),
        ]
    assert np.isfinite(ref.run(model, images)).all()


def test_detection_size():
    model = build_tiny('MODEL.STEM_WIDTH', 8).eval()
    assert [list(x.shape) for x in model.features(paddle.zeros([1, 3, 1333, 800]))] == [
        [1, 16, 334, 200], [1, 32, 167, 100],
    ]


def test_padding_changes_nothing_inside():
    """Blocks of 4 with a halo of 1: the first two rows and columns of blocks see the first 9 pixels only."""
    rng, sizes = np.random.default_rng(0), {'num_heads': 2, 'block_size': 4, 'halo_size': 1}
    q, kv, tables = (
        rng.normal(size=(1, 8, 14, 13)), rng.normal(size=(1, 16, 14, 13)), rng.normal(size=(2, 11, 4)),
    )
    whole, part = (
        halo_attention(*map(paddle.to_tensor, (q[..., :h, :w], kv[..., :h, :w], *tables)), **sizes).numpy()
        for h, w in ((14, 13), (12, 12))
    )
    assert np.array_equal(whole[:, :, :8, :8], part[:, :, :8, :8])
    assert not np.array_equal(whole[:, :, :12, :12], part)


@pytest.mark.parametrize('map_size, H, W', [((5, 5), 4, 5), ((4, 7), 4, 7), ((6, 3), 6, 2)])
def test_bottleneck_attention_equals_global_attention(map_size, H, W):
    layer = BottleneckAttention(6, 8, num_heads=2, map_size=map_size)
    height, width = map_size
    x = np.random.default_rng(0).normal(size=(1, 6, H, W)).astype('float32')
    qkv = np.einsum('bchw,kc->bkhw', x, layer.qkv.weight.numpy()[:, :, 0, 0]).reshape(3, 2, 4, H * W)
    rows, columns = layer.pos_embed.height_rel.numpy(), layer.pos_embed.width_rel.numpy()
    assert (len(rows), len(columns)) == (2 * height - 1, 2 * width - 1)         # as timm's
    expected = np.zeros((2, 4, H * W))
    for n, i in np.ndindex(2, H * W):
        query = qkv[0, n, :, i]
        logits = [
            query @ (qkv[1, n, :, j] / 2 + rows[j // W - i // W + height - 1]
                     + columns[j % W - i % W + width - 1])
            for j in range(H * W)
        ]
        expected[n, :, i] = qkv[2, n] @ (np.exp(logits) / np.exp(logits).sum())
    np.testing.assert_allclose(ref.run(layer, x).reshape(expected.shape), expected, rtol=0, atol=1e-5)
    for too_large in ((H, width + 1), (height + 1, W)):
        message = '{}x{} exceeds the {}x{} .*DATA.IMAGE_SIZE'.format(*too_large, height, width)
        with pytest.raises(ValueError, match=message):
            layer(paddle.zeros([1, 6, *too_large]))


def test_lambda_layer_equals_a_loop():
    """out[n] at pixel i = sum over keys of q[n, key] times
    (sum_j softmax(k)[key, j] v[j] + bias + sum around i of kernel[key] v)."""
    N, d, v, side, H, W = 2, 3, 4, 3, 5, 4
    layer = LambdaLayer(6, N * v, N, side, head_dim=d).eval()
    x = np.random.default_rng(0).normal(size=(1, 6, H, W)).astype('float32')
    q, k, value = np.split(
        np.einsum('chw,kc->khw', x[0], layer.qkv.weight.numpy()[:, :, 0, 0]), [N * d, N * d + d]
    )
    q, value = q / (1 + 1e-5) ** 0.5, value / (1 + 1e-5) ** 0.5              # fresh norms
    share = np.exp(k) / np.exp(k).sum((1, 2), keepdims=True)
    content = np.einsum('dhw,vhw->dv', share, value)
    kernel, bias = layer.conv_lambda.weight.numpy()[:, 0, :, :, 0], layer.conv_lambda.bias.numpy()
    expected = np.zeros((N * v, H, W))
    for y, x_ in np.ndindex(H, W):
        position = np.repeat(bias[:, None], v, axis=1).astype('float64')
        for i, j in np.ndindex(side, side):
            row, column = y + i - 1, x_ + j - 1
            if 0 <= row < H and 0 <= column < W:
                position += np.outer(kernel[:, i, j], value[:, row, column])
        expected[:, y, x_] = (q[:, y, x_].reshape(N, d) @ (content + position)).ravel()
    np.testing.assert_allclose(ref.run(layer, x)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('opts', [[], MIXED, ['MODEL.BLOCK_SIZE', 3]], ids=['halo', 'every kind', 'pooled'])
def test_exported_model_takes_any_batch_and_size(tmp_path, opts):
    # bot: see below
    opts = [
        ['conv lambda', 'halo*2', 'halo'] if value is MIXED[1] else value for value in opts
    ]
    model = build_tiny(*opts).eval()
    paddle.jit.save(
        model, str(tmp_path / 'net'), input_spec=[paddle.static.InputSpec([None, 3, None, None], 'float32')]
    )
    loaded = paddle.jit.load(str(tmp_path / 'net'))
    for shape in ((2, 3, 32, 32), (1, 3, 40, 56), (3, 3, 37, 61)):
        images = ref.seeded_images(shape)
        np.testing.assert_allclose(ref.run(loaded, images), ref.run(model, images), rtol=1e-5, atol=1e-5)


def test_bottleneck_attention_is_exported_for_its_size_only(tmp_path):
    model, spec = build_tiny(*MIXED).eval(), paddle.static.InputSpec
    with pytest.raises(ValueError, match='traced and exported for one image size'):
        paddle.jit.save(model, str(tmp_path / 'net'), input_spec=[spec([None, 3, None, None], 'float32')])
    paddle.jit.save(model, str(tmp_path / 'net'), input_spec=[spec([None, 3, 64, 64], 'float32')])
    images = ref.seeded_images((2, 3, 64, 64))
    loaded = paddle.jit.load(str(tmp_path / 'net'))
    np.testing.assert_allclose(ref.run(loaded, images), ref.run(model, images), rtol=1e-5, atol=1e-5)


# ---- a backbone

def test_features_are_the_outputs_of_the_stages():
    model = build_tiny('MODEL.HEAD_WIDTH', 24).eval()
    x = paddle.to_tensor(ref.seeded_images((2, 3, 32, 32)))
    first = model.stages[0](model.stem(x))
    second = model.stages[1](first)
    assert [np.array_equal(a.numpy(), b.numpy()) for a, b in zip(model.features(x), (first, second))] == [
        True, True,
    ]
    last = model.forward_features(x)
    assert np.array_equal(last.numpy(), model.final_conv(second).numpy()) and list(last.shape) == [
        2, 24, 4, 4,
    ]
    np.testing.assert_allclose(
        model(x).numpy(), model.head.fc(last.mean([2, 3])).numpy(), rtol=1e-5, atol=1e-7
    )
    assert model.feature_info == [{'stride': 4, 'width': 16}, {'stride': 8, 'width': 32}]


def test_without_classifier():
    model, whole = build_tiny('MODEL.NUM_CLASSES', 0).eval(), build_tiny().eval()
    assert set(whole.state_dict()) - set(model.state_dict()) == {'head.fc.weight', 'head.fc.bias'}
    images = ref.seeded_images((2, 3, 32, 32))
    features = whole.forward_features(paddle.to_tensor(images)).mean([2, 3]).numpy()
    np.testing.assert_allclose(ref.run(model, images), features, rtol=1e-5, atol=1e-6)


def test_backbone_loads_the_weights_of_a_classifier(tmp_path):
    whole, model = build_tiny(), build_tiny('MODEL.NUM_CLASSES', 0)
    paddle.save(whole.state_dict(), str(tmp_path / 'whole.pdparams'))
    weights.load_pretrained(model, str(tmp_path / 'whole.pdparams'))
    assert all(
        (value.numpy() == whole.state_dict()[key].numpy()).all() for key, value in model.state_dict().items()
    )


class Detector(nn.Layer):
    """A score per pixel of the first map, from both maps of a backbone without classifier."""

    def __init__(self):
        super().__init__()
        self.backbone = build_tiny('MODEL.NUM_CLASSES', 0)
        self.lateral = nn.LayerList([nn.Conv2D(info['width'], 8, 1) for info in self.backbone.feature_info])
        self.score = nn.Conv2D(8, 1, 3, padding=1)

    def forward(self, x):
        fine, coarse = (layer(maps) for layer, maps in zip(self.lateral, self.backbone.features(x)))
        return self.score(fine + nn.functional.interpolate(coarse, fine.shape[2:]))


def test_detector_trains():
    """Find a bright square of 8 pixels in images of 36 x 52, which do not divide into blocks."""
    rng, model = np.random.default_rng(0), Detector()
    images, targets = rng.normal(0, 0.3, (8, 3, 36, 52)).astype('float32'), np.zeros((8, 1, 9, 13), 'float32')
    for i, (y, x) in enumerate(rng.integers(0, 7, (8, 2))):
        images[i, :, 4 * y:4 * y + 8, 4 * x:4 * x + 8] += 2
        targets[i, 0, y:y + 2, x:x + 2] = 1
    optimizer, losses = paddle.optimizer.AdamW(3e-3, parameters=model.parameters()), []
    for _ in range(25):
        loss = nn.functional.binary_cross_entropy_with_logits(
            model(paddle.to_tensor(images)), paddle.to_tensor(targets)
        )
        loss.backward()
        unused = [key for key, p in model.named_parameters() if p.trainable and p.grad is None]
        optimizer.step()
        optimizer.clear_grad()
        losses.append(loss.item())
    assert unused == []
    assert losses[-1] < 0.25 * losses[0]


def test_paddle_hub(tmp_path, request):
    folder = str(request.config.rootpath)
    names = {get_config(path).MODEL.NAME for path in request.config.rootpath.glob('configs/[!_]*.yaml')}
    assert names == {*paddle.hub.list(folder, source='local')}
    assert '12.48 M parameters' in paddle.hub.help(folder, 'halonet_26t', source='local')
    model, path = paddle.hub.load(folder, 'halonet_digits', source='local'), str(tmp_path / 'model.pdparams')
    paddle.save(ref.fill_seeded(model).state_dict(), path)
    loaded = paddle.hub.load(folder, 'halonet_digits', source='local', pretrained=path)
    images = ref.seeded_images((2, 3, 32, 32))
    assert np.array_equal(ref.run(loaded.eval(), images), ref.run(model.eval(), images))
    backbone = paddle.hub.load(folder, 'halonet_26t', source='local', opts=['MODEL.NUM_CLASSES', 0])
    assert [info['stride'] for info in backbone.feature_info] == [4, 8, 16, 32]


# ---- frozen parts, recomputation

def train_twice(model, images):
    """Two steps of plain SGD; returns the gradients of the second."""
    model.train()
    paddle.seed(5)
    optimizer = paddle.optimizer.SGD(0.1, parameters=[p for p in model.parameters() if not p.stop_gradient])
    for _ in range(2):
        optimizer.clear_grad()
        model(paddle.to_tensor(images)).square().mean().backward()
        optimizer.step()
    return {key: p.grad.numpy().copy() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('parts', [0, 1, 2, 3])
def test_freeze(parts):
    model = build_tiny('MODEL.FREEZE', parts, 'MODEL.DROPPATH', 0.5)
    before = ref.arrays(model)
    train_twice(model, ref.seeded_images((4, 3, 32, 32)))
    after = ref.arrays(model)
    fixed = ('stem.', 'stages.0.', 'stages.1.')[:parts]
    for key in before:
        same = np.array_equal(before[key], after[key])
        assert same == key.startswith(fixed) if parts else not same, key
    rates = [layer.drop_path.rate for layer in model.sublayers() if isinstance(layer, Bottleneck)]
    assert rates == [0, 0.25 * (parts < 3), 0.5 * (parts < 3)]


@pytest.mark.parametrize('freeze', [0, 1])
@pytest.mark.parametrize('stages', [1, 2, 3])
def test_recomputation_changes_no_result(stages, freeze):
    opts = [*MIXED, 'MODEL.DROPPATH', 0.4, 'MODEL.FREEZE', freeze]
    plain, model = build_tiny(*opts), build_tiny(*opts, 'TRAIN.RECOMPUTE', stages)
    passes = {key: 0 for key, layer in model.named_sublayers() if isinstance(layer, Bottleneck)}

    def count(key):
        def hook(*_):
            passes[key] += 1
        return hook

    for key, layer in model.named_sublayers():
        if isinstance(layer, Bottleneck):
            layer.register_forward_post_hook(count(key))
    images = ref.seeded_images((4, 3, 64, 64))
    expected, gradients = train_twice(plain, images), train_twice(model, images)
    assert gradients.keys() == expected.keys() and len(gradients) > 40
    for key in expected:
        assert np.array_equal(gradients[key], expected[key]), key
    before, after = ref.arrays(plain), ref.arrays(model)
    # running statistics too: updated once
    assert all(
        np.array_equal(before[key], after[key]) for key in before
    )
    first = freeze == 1  # its input needs no gradient, so that it is not computed again
    assert passes == {
        key: 2 + 2 * (int(key.split('.')[1]) < stages and not (first and key == 'stages.0.0'))
        for key in passes
    }
    model.eval()
    passes.update(dict.fromkeys(passes, 0))
    ref.run(model, images)
    assert {*passes.values()} == {1}
