"""Draw the attention of a query pixel: its block, its window with the halo, and the weight of every key.

One row per picture and layer. On the left is the network's input, with the query (white), its block (solid
line) and its window (dashed). Then comes a panel per head, bright where the weight is large. Each panel has a
scale of its own.

  python tools/visualize.py -pretrained demo/run/final.pdparams demo/digits/val/3/0059.png -output demo/3.png
  python tools/visualize.py -pretrained demo/run/final.pdparams demo/digits/val/3/0059.png -layer 0 -head mean
  python tools/visualize.py -cfg configs/halonet_26t_256.yaml -pretrained halonet_26t_256.pdparams dog.jpg

The weights are those that the model used; -npz writes all of them. The caption 'outside' is the weight of the
zeros around the feature map, which are shown in the margin.
Exit status: 0, or 2 for a mistake in the command or a picture that cannot be read.
"""
import argparse
import os
import sys
from dataclasses import dataclass
from typing import Any, Optional, Union

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system import files, sizes
from tools import cli
from tools.fonts import Writer

import numpy as np
from PIL import Image, ImageDraw

from data import image_files
from reporting.pictures import as_picture

FINE = 2                                            # everything is drawn at twice its size, then reduced
GAP, TEXT = 14, 15                                  # pixels between panels; height of the letters
PAPER, INK, SOFT = (255, 255, 255), (28, 32, 38), (105, 112, 122)
OUTSIDE = (226, 229, 233)                           # the zeros around the feature map
BLOCK, QUERY = (38, 198, 218), (255, 255, 255)
HEAT = np.array([                                   # colours of weights, the smallest first
    (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39),
    (252, 255, 164)])
TINY = 64                                           # pictures up to this side are shown pixel by pixel
SIDES = (200, 2000)                                 # of a panel, pixels; the captions need some room
LEGEND = ('query', 'block', 'window', 'weight of a key, none to most')

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]             # left, top, right, bottom
Query = tuple[int, int]                             # row, column
Head = Union[int, str]                              # a number, or 'mean'


# ---- one panel

@dataclass
class Panel:
    """A picture with a margin for the halo of an AttentionMap. Boxes are in its pixels."""
    pixels: np.ndarray                              # uint8 (H, W, 3)
    attention: Any
    side: int                                       # the longer one of the whole, pixels

    def __post_init__(self) -> None:
        height, width = self.attention.height, self.attention.width
        margin = self.attention.halo_size + 0.1     # with room for the lines, in cells
        self.cell = FINE * self.side / (max(height, width) + 2 * margin)
        self.margin = self.cell * margin
        size = round(self.cell * (width + 2 * margin)), round(self.cell * (height + 2 * margin))
        self.image = Image.new('RGB', size, OUTSIDE)
        kind = Image.Resampling.NEAREST if max(self.pixels.shape) <= TINY else Image.Resampling.LANCZOS
        inner = round(self.cell * width), round(self.cell * height)
        picture = Image.fromarray(self.pixels).resize(inner, kind)
        self.image.paste(picture, (round(self.margin), round(self.margin)))
        self.draw = ImageDraw.Draw(self.image)

    def scaled(self, box: Box) -> list[float]:
        """Return a box in pixels of the panel."""
        return [self.margin + value * self.cell for value in box]

    def outline(self, box: Box, colour: Colour, dashed: bool = False) -> None:
        """Draw the border of a box."""
        left, top, right, bottom = self.scaled(box)
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        for start, end in zip(corners, corners[1:] + corners[:1]):
            self.line(start, end, colour, dashed)

    def line(self, start: Point, end: Point, colour: Colour, dashed: bool) -> None:
        """Draw a line, or an odd number of dashes and gaps, which has a dash at both ends."""
        x, y = start
        width, height = end[0] - x, end[1] - y
        pieces = 1
        if dashed:
            pieces = max(int(max(abs(width), abs(height)) / (6 * FINE)) // 2 * 2 + 1, 1)
        for i in range(0, pieces, 2):
            first, last = i / pieces, (i + 1) / pieces
            ends = [x + first * width, y + first * height, x + last * width, y + last * height]
            self.draw.line(ends, colour, 2 * FINE)

    def mark(self, box: Box) -> None:
        """Draw a dot in the middle of a box."""
        left, top, right, bottom = self.scaled(box)
        x, y = (left + right) / 2, (top + bottom) / 2
        for radius, colour in ((5 * FINE, INK), (3.5 * FINE, QUERY)):
            self.draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)

    def heat(self, weights: np.ndarray, box: Box) -> None:
        """Colour the cells of `box` by `weights` (w, w) in 0 to 1, transparent over the picture."""
        for (r, c), weight in np.ndenumerate(weights):
            x, y = box[0] + c, box[1] + r
            left, top, right, bottom = (round(value) for value in self.scaled((x, y, x + 1, y + 1)))
            under = self.image.crop((left, top, right, bottom))
            inside = 0 <= x < self.attention.width and 0 <= y < self.attention.height
            opacity = 0.35 + 0.6 * weight if inside else 0.8
            colour = Image.new('RGB', under.size, heat_colour(weight))
            self.image.paste(Image.blend(under, colour, opacity), (left, top))


def heat_colour(weight: float) -> Colour:
    """Return the colour of a weight in 0 to 1."""
    positions = np.linspace(0, 1, len(HEAT))
    red, green, blue = (int(np.interp(weight, positions, HEAT[:, i])) for i in range(3))
    return red, green, blue


def geometry(pixels: np.ndarray, attention: Any, query: Query, side: int) -> Image.Image:
    """Draw the picture with the query, its block and its window."""
    panel = Panel(pixels, attention, side)
    panel.outline(attention.window_box(*query), BLOCK, dashed=True)
    panel.outline(attention.block_box(*query), BLOCK)
    panel.mark(attention.query_box(*query))
    return panel.image


def overlay(pixels: np.ndarray, attention: Any, weights: np.ndarray, query: Query, side: int) -> Image.Image:
    """Draw the picture, grey and dark, with the weights (w, w) of a query."""
    grey = np.repeat((0.55 * pixels.mean(-1, keepdims=True)).astype('uint8'), 3, axis=-1)
    panel = Panel(grey, attention, side)
    panel.heat(weights / max(weights.max(), 1e-12), attention.window_box(*query))
    panel.outline(attention.block_box(*query), BLOCK)
    panel.mark(attention.query_box(*query))
    return panel.image


def outside(attention: Any, weights: np.ndarray, query: Query) -> float:
    """Return the sum of those of the `weights` (w, w) that lie outside the feature map."""
    left, top, *_ = attention.window_box(*query)
    rows = slice(max(-top, 0), max(attention.height - top, 0))
    columns = slice(max(-left, 0), max(attention.width - left, 0))
    return max(1 - float(weights[rows, columns].sum()), 0)


# ---- the sheet

@dataclass
class Row:
    """A row of the sheet: its panels, the geometry first, and the lines below each."""
    panels: list[Image.Image]                       # FINE times their size
    captions: list[list[str]]


def make_row(pixels: np.ndarray, caption: str, attention: Any, heads: list[Head], point: Point,
             side: int) -> Row:
    """Draw the row of an AttentionMap; `point` is the query's position in 0 to 1. No `heads` are all."""
    query = attention.query_at(*point)
    weights = attention.probabilities[:, query[0], query[1]].numpy()        # (N, w, w)
    facts = (f'{attention.height}x{attention.width} map, block {attention.block_size}, '
             f'halo {attention.halo_size}')
    row = Row([geometry(pixels, attention, query, side)], [[attention.name, facts, caption]])
    for head in heads or range(len(weights)):
        if head == 'mean':
            name, chosen = 'mean of heads', weights.mean(0)
        else:
            name, chosen = f'head {head}', weights[head]
        margin = outside(attention, chosen, query)
        row.panels.append(overlay(pixels, attention, chosen, query, side))
        row.captions.append([name, f'most {100 * chosen.max():.0f} %, outside {100 * margin:.0f} %'])
    return row


@dataclass
class Text:
    """A line of the sheet; positions are FINE times as large."""
    x: int
    y: int
    line: str
    colour: Colour
    font: Any

    @property
    def right(self) -> int:
        return self.x + round(self.font.getlength(self.line))


def sheet(rows: list[Row], title: str) -> Image.Image:
    """Draw all rows with a title and a legend; the sheet is as wide as the panels and the texts need."""
    lines = [title]
    for row in rows:
        for caption in row.captions:
            lines += caption
    writer = Writer(lines)
    panels = [panel for row in rows for panel in row.panels]
    column_width = max(panel.width for panel in panels) // FINE
    panel_height = max(panel.height for panel in panels) // FINE
    row_height = panel_height + round(4.2 * TEXT) + GAP
    head = round(4.2 * TEXT) + GAP
    texts = [Text(FINE * GAP, FINE * GAP, writer.shown(title), INK, writer.font(FINE * (TEXT + 4)))]
    pictures = []
    for r, row in enumerate(rows):
        for c, (picture, caption) in enumerate(zip(row.panels, row.captions)):
            x, y = FINE * (GAP + c * (column_width + GAP)), FINE * (head + r * row_height)
            pictures.append((picture, (x, y)))
            texts += caption_texts(caption, x, y + FINE * (panel_height + 4), writer)
    legend_at = FINE * GAP, FINE * (GAP + round(2.1 * TEXT)), writer.font(FINE * (TEXT - 1))
    right = legend(ImageDraw.Draw(Image.new('RGB', (1, 1))), *legend_at)
    for picture, (x, _) in pictures:
        right = max(right, x + picture.width)
    for text in texts:
        right = max(right, text.right)
    width = -(-right // FINE) + GAP
    height = head + len(rows) * row_height
    image = Image.new('RGB', (FINE * width, FINE * height), PAPER)
    draw = ImageDraw.Draw(image)
    legend(draw, *legend_at)
    for picture, corner in pictures:
        image.paste(picture, corner)
    for text in texts:
        draw.text((text.x, text.y), text.line, text.colour, text.font)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def caption_texts(caption: list[str], x: int, y: int, writer: Writer) -> list[Text]:
    """Place the lines of a caption from (x, y) on: its heading, then smaller ones."""
    texts = []
    for i, line in enumerate(caption):
        size, colour = (TEXT, INK) if i == 0 else (TEXT - 1, SOFT)
        below = y + FINE * round(1.3 * i * TEXT)
        texts.append(Text(x, below, writer.shown(line), colour, writer.font(FINE * size)))
    return texts


def legend(draw: ImageDraw.ImageDraw, x: int, y: int, font: Any) -> int:
    """Draw the samples of LEGEND in one line from (x, y) on. Returns where it ends."""
    size = FINE * TEXT
    middle = y + size // 2
    end = x
    for name in LEGEND:
        if name == 'query':
            draw.ellipse([x, y, x + size, y + size], INK)
            draw.ellipse([x + 3 * FINE, y + 3 * FINE, x + size - 3 * FINE, y + size - 3 * FINE], QUERY)
        elif name.startswith('weight'):
            for i in range(3 * size):
                draw.line([x + i, y, x + i, y + size], heat_colour(i / (3 * size)))
            x += 2 * size
        else:
            dashes = [(0.0, 2.0)] if name == 'block' else [(0, 0.45), (0.78, 1.22), (1.55, 2)]
            for first, last in dashes:
                draw.line([x + first * size, middle, x + last * size, middle], BLOCK, 3 * FINE)
            x += size
        x += round(1.4 * size)
        draw.text((x, y - FINE), name, SOFT, font)
        end = x + round(draw.textlength(name, font))
        x = end + 2 * size
    return end


# ---- the command

def parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument('pictures', metavar='PICTURE', nargs='+', help='image files')
    parser.add_model()
    parser.add('output', 'the image to write, such as a .png, .jpg or .webp (default: attention.png)',
               default='attention.png', metavar='FILE')
    parser.add('layer', 'layers by name, such as stages.2.1, or by number from 0 (default: all)', nargs='+',
               default=[], metavar='LAYER')
    parser.add('head', 'heads by number from 0, or mean (default: all)', nargs='+', default=[],
               metavar='HEAD')
    parser.add('query', "the query's position, pixels of the network's input from the left and the top "
               '(default: the middle)', nargs=2, type=float, metavar=('X', 'Y'))
    parser.add('side', 'side of a panel, pixels (default: 220)', type=int, default=220, metavar='N')
    parser.add('npz', 'write the weights of all layers, heads and queries of the pictures', metavar='FILE')
    return parser


def choose_layers(maps: list[Any], wanted: list[str]) -> list[Any]:
    """Return the AttentionMaps of these names, or all. Raises ValueError for an unknown name."""
    by_name = {}
    for i, attention in enumerate(maps):
        by_name[attention.name] = by_name[str(i)] = attention
    for name in wanted:
        if name not in by_name:
            known = ', '.join(attention.name for attention in maps)
            raise ValueError(f'-layer {name}: the layers with halo attention are {known}')
    if not wanted:
        return maps
    return [by_name[name] for name in wanted]


def choose_heads(maps: list[Any], wanted: list[str]) -> list[Head]:
    """Return 'mean' and head numbers. Raises ValueError for a head that a layer does not have."""
    fewest = min(len(attention.probabilities) for attention in maps)
    heads: list[Head] = []
    for head in wanted:
        if head == 'mean':
            heads.append(head)
        elif head.isdecimal() and int(head) < fewest:
            heads.append(int(head))
        else:
            raise ValueError(f'-head {head}: it can be mean, or 0 to {fewest - 1} as all of these layers '
                             'have')
    return heads


@dataclass
class Look:
    """The attention of a model to a picture."""
    pixels: np.ndarray                              # uint8 (H, W, 3), what is shown of the network's input
    maps: list[Any]                                 # an AttentionMap per layer
    label: int                                      # of the most probable class
    probability: float


def look(model: Any, config: Any, path: str) -> Look:
    """Run the model on a picture file.

    Raises ValueError for an unreadable file and for a model without halo attention.
    """
    from tools.attention_maps import attention_maps

    import paddle

    import datasets
    data = config.DATA
    try:
        image = datasets.choose_read(data.CHANNELS)(path, data.BACKGROUND, data.MAX_PIXELS)
        pixels = datasets.eval_pixels(image, data.IMAGE_SIZE, data.CROP_PCT)
    except Exception as error:                      # Pillow may raise nearly anything for a damaged file
        raise ValueError(f'{path}: {image_files.reason(error)}') from None
    images = paddle.to_tensor(pixels.transpose(2, 0, 1)[None])              # (1, C, H, W)
    maps, logits = attention_maps(model, datasets.normalise(images, data.MEAN, data.STD))
    if not maps:
        raise ValueError(f'{config.MODEL.NAME} has no layer with halo attention')
    probabilities = paddle.nn.functional.softmax(logits[0]).numpy()
    label = int(probabilities.argmax())
    return Look(np.asarray(as_picture(pixels)), maps, label, float(probabilities[label]))


def query_point(query: Optional[list[float]], image_size: sizes.Size) -> Point:
    """Return the position of -query in 0 to 1. Raises ValueError if it is outside the network's input."""
    height, width = sizes.sides(image_size)
    x, y = query or (width / 2, height / 2)
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"-query {x:g} {y:g}: the network's input has the pixels 0 to {width - 1} "
                         f'from the left and 0 to {height - 1} from the top')
    return x / width, y / height


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot be, OSError for outputs that cannot be written."""
    if not SIDES[0] <= args.side <= SIDES[1]:
        raise ValueError(f'-side {args.side}: it can be {SIDES[0]} to {SIDES[1]}')
    if os.path.splitext(args.output)[1].lower() not in Image.registered_extensions():
        raise ValueError(f'-output {args.output}: its ending selects the kind of image, '
                         'such as .png, .jpg or .webp')
    if args.npz and not args.npz.endswith('.npz'):
        raise ValueError(f'-npz {args.npz}: its name must end with .npz')
    cli.check_outputs(args.output, args.npz)


def main(args: argparse.Namespace) -> int:
    config = cli.config_of(args)
    point = query_point(args.query, config.DATA.IMAGE_SIZE)
    check_options(args)
    names = cli.class_names_or_numbers(config, args.classes)
    model, _ = cli.load_model(config)
    looks = [look(model, config, path) for path in args.pictures]
    chosen = [choose_layers(seen.maps, args.layer) for seen in looks]
    heads = choose_heads(chosen[0], args.head)
    rows = []
    for seen, maps in zip(looks, chosen):
        caption = f'prediction: {names[seen.label]}, {100 * seen.probability:.0f} %'
        rows += [make_row(seen.pixels, caption, attention, heads, point, args.side) for attention in maps]
    picture = sheet(rows, f'{config.MODEL.NAME}: attention of one query')
    kind = Image.registered_extensions()[os.path.splitext(args.output)[1].lower()]
    files.atomic_write(args.output, lambda file: picture.save(file, kind, quality=92, optimize=True))
    layers = [f'{attention.name} ({len(attention.probabilities)} heads)' for attention in looks[0].maps]
    print(f'{args.output}: {len(rows)} rows; layers {", ".join(layers)}')
    if args.npz:
        write_weights(args.npz, looks)
    return 0


def write_weights(path: str, looks: list[Look]) -> None:
    """Write the weights of all pictures and layers as an .npz file, by picture number and layer."""
    arrays = {}
    for i, seen in enumerate(looks):
        for attention in seen.maps:
            arrays[f'{i}/{attention.name}'] = attention.probabilities.numpy()
    files.atomic_write(path, lambda file: np.savez_compressed(file, **arrays))
    print(f'{path}: weights (heads, query rows, query columns, window rows, window columns) '
          'by picture number and layer')


if __name__ == '__main__':
    parser().run(main)
