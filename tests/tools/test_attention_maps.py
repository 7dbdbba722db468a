"""The attention maps are the model's probabilities: compared with the formula and with the layer's output."""
from tools.attention_maps import attention_maps, attention_probabilities

import numpy as np
import paddle
import pytest
from runs import TINY

from config import get_config
from halonet import build_halonet
from model.attention import HaloAttention

CASES = [  # heads, block, halo, stride, height, width
    (2, 4, 1, 1, 8, 12),
    (4, 4, 2, 2, 8, 8),
    (1, 2, 3, 1, 4, 6),
    (2, 3, 1, 2, 6, 6),
    (2, 4, 0, 1, 4, 8),
    (1, 2, 5, 2, 2, 2),
]


def written_out(layer, x, head, row, column):
    """Compute the probabilities of one query (w, w), padding included, and its output, by the definition."""
    block, halo, w = layer.block_size, layer.halo_size, layer.block_size + 2 * layer.halo_size
    q, kv = (part(paddle.to_tensor(x)).numpy().astype('float64')[0] for part in (layer.q, layer.kv))
    stride = x.shape[2] // q.shape[1]
    d = q.shape[0] // layer.num_heads
    q = q[head * d:(head + 1) * d, row, column]
    kv = kv.reshape(layer.num_heads, -1, *kv.shape[1:])[head]
    height, width = (getattr(layer.pos_embed, f'{name}_rel').numpy() for name in ('height', 'width'))
    top, left = row * stride // block * block - halo, column * stride // block * block - halo
    i, j = row % (block // stride), column % (block // stride)  # strided queries are numbered one by one
    logits, values = np.zeros((w, w)), np.zeros((w, w, kv.shape[0] - d))
    for r in range(w):
        for c in range(w):
            y, z = top + r, left + c
            key = np.zeros(kv.shape[0])
            if 0 <= y < kv.shape[1] and 0 <= z < kv.shape[2]:
                key = kv[:, y, z]
            logits[r, c] = q @ key[:d] / d ** 0.5 + q @ height[r - i + w - 1] + q @ width[c - j + w - 1]
            values[r, c] = key[d:]
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return p, np.einsum('rc,rcv->v', p, values)


@pytest.mark.parametrize('heads, block, halo, stride, height, width', CASES)
def test_probabilities_equal_the_formula_and_give_the_output(heads, block, halo, stride, height, width):
    layer = HaloAttention(8, 8, heads, block, halo, stride)
    layer.eval()
    x = np.random.default_rng(1).normal(size=(1, 8, height, width)).astype('float32')
    maps = attention_probabilities(layer, paddle.to_tensor(x))
    w, step = block + 2 * halo, stride if block % stride == 0 else 1
    assert maps.shape == [1, heads, height // step, width // step, w, w]
    out = layer(paddle.to_tensor(x)).numpy()[0]
    if step != stride:                              # all pixels are queries, and the result is averaged
        layer.pool = paddle.nn.Identity()
        out = layer(paddle.to_tensor(x)).numpy()[0]
    for head in range(heads):
        for row in range(height // step):
            for column in range(width // step):
                p, value = written_out(layer, x, head, row, column)
                np.testing.assert_allclose(maps[0, head, row, column].numpy(), p, atol=2e-6)
                np.testing.assert_allclose(
                    out[head * len(value) : (head + 1) * len(value), row, column], value, atol=2e-5
                )


def test_layer_is_unchanged_afterwards():
    layer = HaloAttention(8, 8, 2, 4, 1)
    x = paddle.randn([2, 8, 8, 8])
    before, names = layer(x).numpy(), list(layer.state_dict())
    attention_probabilities(layer, x)
    assert list(layer.state_dict()) == names and np.array_equal(layer(x).numpy(), before)
    with pytest.raises((ValueError, OSError)):      # the composed and the fused operator's
        attention_probabilities(layer, paddle.randn([2, 9, 8, 8]))
    assert list(layer.state_dict()) == names and np.array_equal(layer(x).numpy(), before)


def test_model_gives_a_map_per_layer():
    model = build_halonet(
        get_config(None, [*TINY, 'MODEL.STAGES', ['halo', 'conv halo*2'], 'MODEL.HEADS', [4, 2]])
    )
    model.eval()
    images = paddle.randn([1, 3, 16, 16])
    maps, logits = attention_maps(model, images)
    np.testing.assert_array_equal(logits.numpy(), model(images).numpy())
    assert [m.name for m in maps] == ['stages.0.0', 'stages.1.1', 'stages.1.2']
    assert [m.probabilities.shape for m in maps] == [[4, 8, 8, 6, 6], [2, 4, 4, 6, 6], [2, 4, 4, 6, 6]]
    assert [m.stride for m in maps] == [1, 1, 1]
    with_stride = build_halonet(get_config(None, TINY))
    with_stride.eval()
    (strided,), _ = attention_maps(with_stride, images)
    assert (strided.stride, strided.height, strided.probabilities.shape) == (2, 8, [2, 4, 4, 6, 6])
    assert strided.query_at(0.99, 0.3) == (1, 3) and strided.query_box(1, 3) == (6, 2, 7, 3)
    assert strided.block_box(1, 3) == (4, 0, 8, 4) and strided.window_box(1, 3) == (3, -1, 9, 5)
    assert strided.query_at(1, 1) == (3, 3)
    np.testing.assert_allclose(strided.probabilities.sum([3, 4]).numpy(), 1, atol=1e-6)
