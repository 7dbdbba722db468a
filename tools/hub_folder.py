"""The folder of a model on the Hugging Face hub, as timm reads it."""
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from system import sizes
from tools import cli, export_files

from config import flatten, get_config
from data import bands

ARCHITECTURES = {                                   # config -> the same network in timm
    'halonet_26t_256': 'halonet26t',
    'halonet_50ts_256': 'halonet50ts',
    'halonet_h1_timm_256': 'halonet_h1',
    'sehalonet_33ts_256': 'sehalonet33ts',
    'eca_halonext_26ts_256': 'eca_halonext26ts',
    'haloregnetz_b_224': 'haloregnetz_b',
    'halo2botnet_50ts_256': 'halo2botnet50ts_256',
    'lamhalobotnet_50ts_256': 'lamhalobotnet50ts_256',
}
OF_TRAINING = {                                     # options of MODEL that do not change the network
    'MODEL.NAME', 'MODEL.NUM_CLASSES', 'MODEL.PRETRAINED', 'MODEL.PRETRAINED_EMA', 'MODEL.RESUME',
    'MODEL.RESUME_FORCE', 'MODEL.ATTENTION', 'MODEL.DROPOUT', 'MODEL.DROPPATH', 'MODEL.FREEZE',
    'MODEL.FREEZE_NORM'}
FRONT_MATTER = """---
tags:
- image-classification
- timm
library_name: timm
---
"""
USE = ['```python', 'import timm', "model = timm.create_model('local-dir:FOLDER', pretrained=True)",
       "# or, once it is uploaded: timm.create_model('hf-hub:OWNER/MODEL', pretrained=True)", '```', '']


def architecture(config: Any) -> str:
    """Return timm's name of the network of a config. Raises ValueError for one that timm does not have."""
    network = network_of(config)
    for file, name in ARCHITECTURES.items():
        if network_of(get_config(file)) == network:
            return name
    raise ValueError(f'timm has no network like {config.MODEL.NAME}; its HaloNets are those of '
                     + ', '.join(ARCHITECTURES))


def network_of(config: Any) -> dict[str, Any]:
    """Return the options that decide the layers of a network, but for the number of classes."""
    return {key: value for key, value in flatten(config).items()
            if key.startswith('MODEL.') and key not in OF_TRAINING}


def hub_config(config: Any, features: int, names: Sequence[str] | None) -> dict[str, Any]:
    """Return the content of config.json, for a network whose classifier has so many input features."""
    data = config.DATA
    sides = sizes.sides(data.IMAGE_SIZE)
    single = config.MODEL.STEM != 'tiered' and not config.MODEL.STEM_POOL
    content = {
        'architecture': architecture(config),
        'num_classes': config.MODEL.NUM_CLASSES,
        'num_features': features,
        'pretrained_cfg': {
            'input_size': [data.CHANNELS, *sides],
            'min_input_size': [data.CHANNELS, *sides],
            'fixed_input_size': any('bot' in stage for stage in config.MODEL.STAGES),
            'pool_size': [-(-side // 32) for side in sides],
            'crop_pct': data.CROP_PCT,
            'crop_mode': 'center',
            'interpolation': 'bicubic',
            'mean': bands.per_channel(data.MEAN, data.CHANNELS),
            'std': bands.per_channel(data.STD, data.CHANNELS),
            'num_classes': config.MODEL.NUM_CLASSES,
            'first_conv': 'stem.conv' if single else 'stem.conv1.conv',
            'classifier': 'head.fc',
        },
    }
    if names:
        content['label_names'] = list(names)
    if data.CHANNELS != 3:
        content['model_args'] = {'in_chans': data.CHANNELS}
    return content


def write(folder: str, config: Any, model: Any, weights: bytes, names: Sequence[str] | None) -> None:
    """Write the folder: model.safetensors of the bytes `weights`, config.json and README.md.

    `model` is the network of the config.
    """
    features = model.head.fc.weight.shape[0]
    cli.write_json(os.path.join(folder, 'config.json'), hub_config(config, features, names))
    with open(os.path.join(folder, 'model.safetensors'), 'wb') as file:
        file.write(weights)
    lines = [*export_files.card_head(config, export_files.card_facts(config, model)), *USE]
    cli.write_text(os.path.join(folder, 'README.md'), FRONT_MATTER + '\n'.join(lines))
