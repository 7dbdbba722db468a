"""Classify pictures with the model.onnx beside this file. Needs numpy, Pillow and onnxruntime only.

    python infer.py dog.jpg holidays/              the five most probable classes of each picture
    python infer.py holidays/ -top 1 -json         as JSON

tools/export.py of the HaloNet project has copied it here. It reads preprocess.json and meta.json.
Exit status: 0, or 1 if a picture could not be read, or 2 for a mistake in the command.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import numpy as np
    from PIL import Image, ImageColor
except ImportError as missing:
    print(f'error: the package {missing.name} is missing in {sys.executable}; install the requirements by '
          'python -m pip install numpy pillow onnxruntime', file=sys.stderr)
    sys.exit(2)

Image.init()                                        # registers the formats that this Pillow has
ENDINGS = {'.jpg', '.jpeg', '.png', '.webp', '.avif', '.gif', '.bmp', '.tif', '.tiff', '.ppm', '.pgm', '.npy'}
READ = ('JPEG', 'PNG', 'WEBP', 'AVIF', 'GIF', 'BMP', 'TIFF', 'PPM')  # never EPS, which starts another program
FORMATS = [name for name in READ if name in Image.OPEN]
BATCH = 8                                           # pictures per call of the model


# ---- from a file to the input of the model; preprocess.json has these steps in words
#
# They repeat what data/image_files.py, data/bands.py and datasets.py of the project do, as this file must do
# without them. A test of the project compares the results.

def read(path: Path, channels: int, background: str) -> list[Image.Image]:
    """Read a file as one RGB image, or where `channels` is not 3 as a grey image per channel."""
    if path.suffix.lower() == '.npy':
        pixels = np.load(path, allow_pickle=False)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
            raise ValueError(f'an array {pixels.dtype} {pixels.shape}; it must be uint8 (H, W, {channels})')
        return [Image.fromarray(np.ascontiguousarray(pixels[:, :, i])) for i in range(channels)]
    with Image.open(path, formats=FORMATS) as image:
        image.load()
    if image.mode == 'F' or image.mode == 'I' and image.format not in ('PNG', 'PPM'):
        raise ValueError('32-bit values have no range that is known; save it with 8 or 16 bits')
    if image.mode[0] == 'I':                        # grey with 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if channels > 1 and channels != 3:
        if image.mode == 'P':
            image = image.convert('RGBA' if image.has_transparency_data else 'RGB')
        if len(image.getbands()) != channels:
            raise ValueError(f'{len(image.getbands())} channels; the model takes {channels}')
        return list(image.split())
    if background != 'drop' and image.has_transparency_data:
        image = image.convert('RGBA')
        flat = Image.new('RGB', image.size, ImageColor.getrgb(background))
        flat.paste(image, mask=image)
        image = flat
    image = image.convert('RGB')
    return [image.convert('L')] if channels == 1 else [image]


def resized_size(width: int, height: int, cover: Sequence[int]) -> tuple[int, int]:
    """Return the (width, height) of an image that just covers `cover`, (height, width)."""
    rows, columns = cover
    if rows != columns:
        scale = min(height / rows, width / columns)
        return round(width / scale), round(height / scale)
    if width <= height:
        return columns, int(columns * height / width)
    return int(rows * width / height), rows


def corner(length: int, size: int) -> int:
    """Return where the centre crop of `size` pixels starts; negative where it is padded with black."""
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def resize_and_crop(image: Image.Image, cover: Sequence[int], crop: Sequence[int]) -> np.ndarray:
    """Resize an image until it covers `cover`, and cut out its centre: uint8 (H, W) or (H, W, 3)."""
    width, height = resized_size(image.width, image.height, cover)
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)      # rows first: the pixels are
    image = image.resize((width, height), Image.Resampling.BICUBIC)            # then those of any Pillow
    left, top = corner(width, crop[1]), corner(height, crop[0])
    return np.asarray(image.crop((left, top, left + crop[1], top + crop[0])))


def prepare(path: Path, facts: dict[str, Any]) -> np.ndarray:
    """Return a picture as the input of the model, float32 (C, H, W), or uint8 (H, W, C) for pixels."""
    pictures = read(path, facts['channels'], facts['background'])
    parts = [resize_and_crop(picture, facts['cover'], facts['crop']) for picture in pictures]
    pixels = parts[0] if parts[0].ndim == 3 else np.stack(parts, axis=-1)
    if facts['input']['type'] == 'uint8':
        return pixels
    mean, std = (np.asarray(facts[name], np.float32) for name in ('mean', 'std'))
    return ((pixels - 255 * mean) / (255 * std)).astype(np.float32).transpose(2, 0, 1)


# ---- the command

def find(names: Sequence[str]) -> list[Path]:
    """Return the pictures that files and folders name. Raises SystemExit for a name that is not there."""
    found = []
    for name in map(Path, names):
        if name.is_dir():
            found += sorted(path for path in name.rglob('*') if path.suffix.lower() in ENDINGS)
        elif name.exists():
            found.append(name)
        else:
            print(f'infer.py: error: {name}: no such file or folder', file=sys.stderr)
            sys.exit(2)
    return found


def classify(session: Any, paths: Sequence[Path], facts: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Yield each path with its classes, as `best_of`, or with the error of a picture that cannot be read."""
    for start in range(0, len(paths), BATCH):
        found: dict[Path, Any] = {}
        for path in paths[start:start + BATCH]:
            try:
                found[path] = prepare(path, facts)
            except Exception as error:              # Pillow may raise nearly anything for a damaged file
                found[path] = error
        good = [path for path in found if isinstance(found[path], np.ndarray)]
        if good:
            images = np.stack([found[path] for path in good])
            outputs = session.run(None, {session.get_inputs()[0].name: images})
            found.update(zip(good, best_of(outputs, facts['result'])))
        yield from found.items()


def best_of(outputs: Sequence[np.ndarray], result: str) -> list[list[tuple[int, float]]]:
    """Return (label, probability) of the classes of each picture, the most probable first."""
    values: np.ndarray = outputs[0].astype(np.float64)
    if result == 'logits':
        values = np.exp(values - values.max(axis=1, keepdims=True))
        values /= values.sum(axis=1, keepdims=True)
    labels = outputs[1] if result == 'topk' else np.argsort(-values, axis=1, kind='stable')
    if result != 'topk':
        values = np.take_along_axis(values, labels, axis=1)
    return [list(zip(row.tolist(), numbers.tolist())) for row, numbers in zip(labels, values)]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pictures', nargs='+', metavar='PICTURE', help='files, or folders of pictures')
    parser.add_argument('-top', '--top', type=int, default=5, metavar='N',
                        help='classes to name (default: 5)')
    parser.add_argument('-json', '--json', action='store_true', help='print JSON')
    return parser


def main() -> int:
    options = parser()
    args = options.parse_args()
    here = Path(__file__).resolve().parent
    for name in ('model.onnx', 'preprocess.json', 'meta.json'):
        if not (here / name).exists():
            options.error(f'{here / name} is missing; this program belongs to a folder of tools/export.py')
    try:
        import onnxruntime
    except ImportError as error:
        options.error(f'{error}; python -m pip install onnxruntime')
    facts = json.loads((here / 'preprocess.json').read_text(encoding='utf-8'))
    names = json.loads((here / 'meta.json').read_text(encoding='utf-8'))['classes']
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3                 # errors; a file for any size has harmless warnings
    session = onnxruntime.InferenceSession(str(here / 'model.onnx'), settings,
                                           providers=['CPUExecutionProvider'])
    status = 0
    pictures: list[dict[str, Any]] = []
    for path, result in classify(session, find(args.pictures), facts):
        if isinstance(result, Exception):
            status = 1
            pictures.append({'picture': str(path), 'error': f'{type(result).__name__}: {result}'})
        else:
            top = [{'label': label, 'name': names[label] if names else f'class {label}',
                    'probability': round(probability, 6)} for label, probability in result[:args.top]]
            pictures.append({'picture': str(path), 'top': top})
        if not args.json:
            show(pictures[-1])
    if args.json:
        print(json.dumps({'pictures': pictures}, indent=1, ensure_ascii=False))
    return status


def show(picture: dict[str, Any]) -> None:
    """Print the result of a picture as text."""
    if 'error' in picture:
        print(f'{picture["picture"]}: cannot be read: {picture["error"]}', file=sys.stderr)
        return
    print(picture['picture'])
    for entry in picture['top']:
        print(f'  {100 * entry["probability"]:6.2f} %  {entry["name"]}')


if __name__ == '__main__':
    sys.exit(main())
