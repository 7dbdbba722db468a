"""Make a run folder with many classes, records and predictions, without a training."""
import json

import numpy as np
from PIL import Image

from config import get_config
from reporting.report import write
from training import records


def make_run(folder, classes, count, names):
    """Write a run folder with `count` predictions of `classes` classes, and its page.

    Misclassified images have a picture in data/val/NAME. Returns their labels and predictions.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    top1 = np.where(rng.random(count) < 0.7, labels, (labels + rng.integers(1, 4, count)) % classes)
    lines = []
    for i, label in enumerate(labels):
        path = folder / 'data' / 'val' / names[label] / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        if top1[i] != label:
            Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype='uint8')).save(path)
        lines.append(f'{path.relative_to(folder / "data")} {label}\n')
    (folder / 'data' / 'val_list.txt').write_text(''.join(lines))
    options = ['DATA.DATA_PATH', str(folder / 'data'), 'MODEL.NUM_CLASSES', classes]
    (folder / 'config.yaml').write_text(get_config('configs/halonet_50ts_256.yaml', options).dump())
    rows = np.stack([np.arange(count), labels, top1, rng.random(count), rng.random(count)], 1)
    records.write_predictions(folder / 'predictions_val.npz', rows)
    with open(folder / 'metrics.jsonl', 'w', encoding='utf-8') as file:
        for step in range(1, 1501):
            record = {'epoch': (step - 1) // 5 + 1, 'step': step, 'split': 'train',
                      'loss': 7 / step ** 0.5 + rng.random(), 'acc1': 1.0, 'acc5': 5.0,
                      'lr': 1e-3 * (1 - step / 1501), 'images_per_s': 3000.0, 'data_wait': rng.random()}
            file.write(json.dumps(record) + '\n')
            if step % 5 == 0:
                del record['data_wait']
                file.write(json.dumps({**record, 'split': 'val', 'lr': None}) + '\n')
    write([str(folder)], folder / 'report.html')
    return labels, top1
