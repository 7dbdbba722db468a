"""configs/paper/: the configs, their sizes in docs/paper.md, and halo attention in another network."""
import re
from pathlib import Path

from system import paddle_internals

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.vision.models import resnet18

from config import get_config
from halonet import build_halonet, count_parameters
from model.attention import HaloAttention
from training.macs import total_multiply_adds

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted(ROOT.glob('configs/paper/*.yaml'))
PUBLISHED = {'resnet_50_256': (25.557032, 0), 'h4_wide_384': (85, 0.03), 'h4_wide_conv12_384': (87, 0.03)}


def row_of(path):
    """Return the cells of a config in the table of docs/paper.md."""
    page = (ROOT / 'docs' / 'paper.md').read_text(encoding='utf-8')
    (line,) = re.findall(rf'^\| `configs/paper/{path.name}` .*$', page, re.M)
    return [cell.strip() for cell in line.strip('|').split('|')]


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_sizes_are_those_of_the_page_and_published_ones(path):
    config = get_config(path)
    with paddle.LazyGuard():
        model = build_halonet(config)
    side, millions = config.DATA.IMAGE_SIZE, count_parameters(model) / 1e6
    assert row_of(path)[2:] == [f'{millions:.2f} M', f'{total_multiply_adds(model, side, side) / 1e9:.2f}']
    if path.stem in PUBLISHED:
        number, tolerance = PUBLISHED[path.stem]
        assert millions == pytest.approx(number, rel=tolerance or 1e-9)


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_headers_tell_what_is_known(path):
    header = ''.join(line for line in path.read_text().splitlines(keepends=True) if line.startswith('#'))
    header = header.replace('\n# ', ' ')
    assert re.search('Published|published|not known', header) and 'Not trained by this project' in header


def test_names_are_of_one_config_each():
    names = [get_config(path).MODEL.NAME for path in [*PATHS, *ROOT.glob('configs/[!_]*.yaml')]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize('side', [64, 75])
def test_halo_attention_replaces_convolutions_of_another_network(side):
    """In Paddle's ResNet-18: the same shapes for any size of image, and every weight learns."""
    paddle.seed(0)
    network, original = resnet18(num_classes=7), resnet18(num_classes=7)
    for block in network.layer3:
        for name in ('conv1', 'conv2'):
            conv = getattr(block, name)
            width, stride = conv.weight.shape[1], paddle_internals.stride_of(conv)
            setattr(block, name, HaloAttention(width, conv.weight.shape[0], 4, block_size=4, halo_size=1,
                                               stride=stride))
    images = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 3, side, side)).astype('float32'))
    shapes = []
    for model in (network, original):
        body = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2,
                             model.layer3)
        shapes.append(body(images).shape)
    assert shapes[0] == shapes[1]
    logits = network(images)
    logits.sum().backward()
    assert logits.shape == [2, 7]
    learnt = [parameter for parameter in network.parameters() if not parameter.stop_gradient]
    assert all(np.isfinite(parameter.grad.numpy()).all() for parameter in learnt)
