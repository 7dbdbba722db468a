"""Run a program of timm with the comparison's network registered as the model `halonet_small`.

    PYTHONPATH=TIMM python timm_side.py TIMM/train.py --model halonet_small ...

It runs in an environment with PyTorch and without Paddle.
"""
import runpy
import sys

import torch

# A torchvision without compiled operators describes two operators that PyTorch then does not know.
operators = torch.library.Library('torchvision', 'FRAGMENT')
for schema in ('nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor',
               'qnms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor'):
    try:
        operators.define(schema)
    except RuntimeError:                            # a complete torchvision
        pass

from timm.models import build_model_with_cfg, register_model  # noqa: E402 (needs the operators above)
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg  # noqa: E402


def network(stride: int) -> ByoModelCfg:
    """Return the network of halonet_small.yaml, with the stride of its second stage."""
    attention = dict(block_size=4, halo_size=1, num_heads=4)
    return ByoModelCfg(
        blocks=(
            ByoBlockCfg(type='bottle', d=1, c=64, s=1, gs=0, br=0.5),
            ByoBlockCfg(type='self_attn', d=2, c=128, s=stride, gs=0, br=0.5,
                        self_attn_layer='halo', self_attn_kwargs=attention),
        ),
        stem_chs=32,
        stem_type='tiered',
        stem_pool='maxpool',
    )


@register_model
def halonet_small(pretrained: bool = False, stride: int = 1, **options: object) -> ByobNet:
    """Build the network. It has no pretrained weights."""
    return build_model_with_cfg(ByobNet, 'halonet_small', pretrained, model_cfg=network(stride),
                                feature_cfg=dict(flatten_sequential=True), **options)


if __name__ == '__main__':
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
