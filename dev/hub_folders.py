"""Compare the hub folders of all networks that timm has with timm itself.

    python dev/hub_folders.py FOLDER            make them, with random weights and this project's logits
    python dev/hub_folders.py FOLDER -timm      in an environment with timm, without Paddle: compare
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CLASSES = 7


def make(folder: Path) -> None:
    """Write a run folder, its hub folder, images and logits for each network."""
    from tools import hub_folder, port_weights

    import paddle

    from config import get_config
    from halonet import build_halonet
    for file, name in hub_folder.ARCHITECTURES.items():
        config = get_config(file, ['MODEL.NUM_CLASSES', CLASSES])
        model = build_halonet(config)
        random = np.random.default_rng(0)
        for value in model.parameters():            # a new block returns its shortcut: its scale is 0
            if len(value.shape) == 1:
                value.set_value(random.uniform(0.1, 0.4, value.shape).astype('float32'))
        model.eval()
        place = folder / name
        place.mkdir(parents=True)
        paddle.save(model.state_dict(), str(place / 'final.pdparams'))
        port_weights.port_to_hub(str(place / 'final.pdparams'), str(place / 'hub'), cfg=file)
        side = config.DATA.IMAGE_SIZE
        images = random.standard_normal((2, 3, side, side), dtype='float32')
        with paddle.no_grad():
            np.savez(place / 'logits.npz', images=images, logits=model(paddle.to_tensor(images)).numpy())
        print(f'{place}: made', flush=True)


def compare(folder: Path) -> None:
    """Print how far timm's logits are from ours, in standard deviations of these."""
    import timm
    import torch
    for path in sorted(folder.glob('*/logits.npz')):
        model = timm.create_model(f'local-dir:{path.parent}/hub', pretrained=True).eval()
        saved = np.load(path)
        with torch.no_grad():
            logits = model(torch.from_numpy(saved['images'])).numpy()
        difference = np.abs(logits - saved['logits']).max() / saved['logits'].std()
        print(f'{path.parent.name}: {difference:.1e}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='FOLDER', type=Path)
    parser.add_argument('-timm', '--timm', action='store_true', help='compare with timm')
    args = parser.parse_args()
    if args.timm:
        compare(args.folder)
    else:
        make(args.folder)


if __name__ == '__main__':
    main()
