"""What a halo attention looks at: for a query pixel, its block, its window with the halo, and the weight of every key.

One row per picture and layer. On the left the picture as the network saw it, with the query (white), its block (solid
line) and its window (dashed); then a panel per head, bright where the weight is large, each on a scale of its own.

  python tools/visualize.py -pretrained demo/run/final.pdparams demo/digits/val/3/0059.png -output demo/attention.png
  python tools/visualize.py -pretrained demo/run/final.pdparams demo/digits/val/3/0059.png -layer stages.2.0 -head 2 -query 12 20
  python tools/visualize.py -cfg configs/halonet_26t_256.yaml -pretrained halonet_26t_256.pdparams dog.jpg -head mean

Weights are those that the model used (-npz writes all of them); what a query spends on the zeros around the map is printed
as 'outside' and shown in the margin. Exit status: 0, or 2 for a mistake in the command or a picture that cannot be read.
"""
import os
import sys
from dataclasses import dataclass
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from system import files
from tools import cli
from tools.fonts import Writer

import numpy as np
from PIL import Image, ImageDraw

FINE = 2                                            # everything is drawn at twice its size, then made smooth
GAP, TEXT = 14, 15                                  # pixels between panels; height of the letters
PAPER, INK, SOFT = (255, 255, 255), (28, 32, 38), (105, 112, 122)
OUTSIDE = (226, 229, 233)                           # the zeros around the map
BLOCK, QUERY = (38, 198, 218), (255, 255, 255)
HEAT = np.array([(40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164)])


# ---- one panel

@dataclass
class Panel:
    """A square picture, with a margin for the halo of an AttentionMap of it; boxes are in the map's pixels."""
    pixels: Any                                     # uint8 (S, S, 3)
    attention: Any
    side: int                                       # pixels of the whole

    def __post_init__(self):
        self.cell = FINE * self.side / (self.attention.height + 2 * self.attention.halo_size + 0.2)
        self.margin = self.cell * (self.attention.halo_size + 0.1)           # so that the lines find room as well
        self.image = Image.new('RGB', [FINE * self.side] * 2, OUTSIDE)
        filter = Image.Resampling.NEAREST if len(self.pixels) <= 64 else Image.Resampling.LANCZOS
        picture = Image.fromarray(self.pixels).resize([round(self.cell * self.attention.height)] * 2, filter)
        self.image.paste(picture, [round(self.margin)] * 2)
        self.draw = ImageDraw.Draw(self.image)

    def place(self, box):
        """A box in pixels of the panel."""
        return [self.margin + value * self.cell for value in box]

    def outline(self, box, colour, dashed=False):
        left, top, right, bottom = self.place(box)
        width, dash = 2 * FINE, 6 * FINE
        for (x, y), (to_x, to_y) in (((left, top), (right, top)), ((right, top), (right, bottom)),
                                     ((right, bottom), (left, bottom)), ((left, bottom), (left, top))):
            length = max(abs(to_x - x), abs(to_y - y))
            pieces = max(int(length / dash) // 2 * 2 + 1, 1) if dashed else 1    # odd: a corner on both ends
            for i in range(0, pieces, 2):
                start, end = i / pieces, (i + 1) / pieces
                self.draw.line([x + start * (to_x - x), y + start * (to_y - y), x + end * (to_x - x), y + end * (to_y - y)],
                               colour, width)

    def mark(self, box):
        """A dot in the middle of a box."""
        left, top, right, bottom = self.place(box)
        x, y = (left + right) / 2, (top + bottom) / 2
        for radius, colour in ((5 * FINE, INK), (3.5 * FINE, QUERY)):
            self.draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)

    def heat(self, weights, box):
        """Colour the cells of `box` by `weights` (w, w) in 0 to 1; those in the margin show their colour alone."""
        for (r, c), weight in np.ndenumerate(weights):
            x, y = box[0] + c, box[1] + r
            cell = [round(value) for value in self.place((x, y, x + 1, y + 1))]
            under, inside = self.image.crop(cell), 0 <= min(x, y) and max(x, y) < self.attention.height
            opacity = 0.35 + 0.6 * weight if inside else 0.8
            self.image.paste(Image.blend(under, Image.new('RGB', under.size, heat_colour(weight)), opacity), cell)


def heat_colour(weight):
    """A number in 0 to 1 as (red, green, blue)."""
    return tuple(int(np.interp(weight, np.linspace(0, 1, len(HEAT)), HEAT[:, i])) for i in range(3))


def geometry(pixels, attention, query, side):
    """The picture with the query, its block and its window."""
    panel = Panel(pixels, attention, side)
    panel.outline(attention.window_box(*query), BLOCK, dashed=True)
    panel.outline(attention.block_box(*query), BLOCK)
    panel.mark(attention.query_box(*query))
    return panel.image


def overlay(pixels, attention, weights, query, side):
    """The picture, grey and dark, with the weights (w, w) of a query."""
    grey = np.repeat((0.55 * pixels.mean(-1, keepdims=True)).astype('uint8'), 3, axis=-1)
    panel = Panel(grey, attention, side)
    panel.heat(weights / max(weights.max(), 1e-12), attention.window_box(*query))
    panel.outline(attention.block_box(*query), BLOCK)
    panel.mark(attention.query_box(*query))
    return panel.image


def outside(attention, weights, query):
    """The share of `weights` (w, w) that lies outside the map."""
    left, top, *_ = attention.window_box(*query)
    inside = weights[max(-top, 0):max(attention.height - top, 0), max(-left, 0):max(attention.width - left, 0)]
    return max(1 - float(inside.sum()), 0)


# ---- the sheet

@dataclass
class Row:
    """A row of the sheet: what is below the panel on the left, then the panels with what is below them."""
    panels: list                                    # images, FINE times their size
    captions: list                                  # lists of lines


def rows_of(pixels, caption, maps, heads, point, side):
    """A Row per AttentionMap; `point` is the query's place in 0 to 1, `heads` are numbers or 'mean', or empty for all."""
    rows = []
    for attention in maps:
        query = attention.query_at(*point)
        weights = attention.probabilities[:, query[0], query[1]].numpy()                 # (N, w, w)
        wanted = heads or range(len(weights))
        chosen = [('mean of heads', weights.mean(0)) if head == 'mean' else (f'head {head}', weights[head]) for head in wanted]
        facts = f'{attention.height}x{attention.width} map, block {attention.block_size}, halo {attention.halo_size}'
        panels = [geometry(pixels, attention, query, side)]
        panels += [overlay(pixels, attention, w, query, side) for _, w in chosen]
        captions = [[attention.name, facts, caption]]
        captions += [[name, f'most {w.max():.0%}, outside {outside(attention, w, query):.0%}'.replace('%', ' %')]
                     for name, w in chosen]
        rows.append(Row(panels, captions))
    return rows


def sheet(rows, title):
    """All rows as one image, with a title and a legend; it is as wide as the panels and the texts need."""
    writer = Writer([title, *(line for row in rows for caption in row.captions for line in caption)])

    def font(size):
        return writer.font(FINE * size)
    panel = rows[0].panels[0].width // FINE
    row_height = panel + round(4.2 * TEXT) + GAP
    head = round(4.2 * TEXT) + GAP
    texts = [(FINE * GAP, FINE * GAP, writer.shown(title), INK, font(TEXT + 4))]
    pictures = []
    for r, row in enumerate(rows):
        for c, (picture, caption) in enumerate(zip(row.panels, row.captions)):
            x, y = FINE * (GAP + c * (panel + GAP)), FINE * (head + r * row_height)
            pictures.append((picture, (x, y)))
            for i, (line, colour) in enumerate(zip(caption, (INK, SOFT, SOFT))):
                below = y + FINE * (panel + 4 + round(1.3 * i * TEXT))
                texts.append((x, below, writer.shown(line), colour, font(TEXT - min(i, 1))))
    place = FINE * GAP, FINE * (GAP + round(2.1 * TEXT)), font(TEXT - 1)
    ends = [x + picture.width for picture, (x, _) in pictures]
    ends += [x + round(size.getlength(text)) for x, _, text, _, size in texts]
    ends.append(legend(ImageDraw.Draw(Image.new('RGB', (1, 1))), *place))
    width, height = -(-max(ends) // FINE) + GAP, head + len(rows) * row_height
    image = Image.new('RGB', (FINE * width, FINE * height), PAPER)
    draw = ImageDraw.Draw(image)
    legend(draw, *place)
    for picture, corner in pictures:
        image.paste(picture, corner)
    for x, y, text, colour, size in texts:
        draw.text((x, y), text, colour, size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def legend(draw, x, y, font):
    """dot query, line block, dashes window, colours weight: in one line from (x, y) on. Returns where it ends."""
    size = FINE * TEXT
    middle = y + size // 2
    for name in ('query', 'block', 'window', 'weight of a key, none to most'):
        if name == 'query':
            draw.ellipse([x, y, x + size, y + size], INK)
            draw.ellipse([x + 3 * FINE, y + 3 * FINE, x + size - 3 * FINE, y + size - 3 * FINE], QUERY)
        elif name.startswith('weight'):
            for i in range(3 * size):
                draw.line([x + i, y, x + i, y + size], heat_colour(i / (3 * size)))
            x += 2 * size
        else:
            dashes = ((0, 2), ) if name == 'block' else ((0, 0.45), (0.78, 1.22), (1.55, 2))
            for start, end in dashes:
                draw.line([x + start * size, middle, x + end * size, middle], BLOCK, 3 * FINE)
            x += size
        x += round(1.4 * size)
        draw.text((x, y - FINE), name, SOFT, font)
        end = x + round(draw.textlength(name, font))
        x = end + 2 * size
    return end


# ---- the command

def parser():
    parser = cli.Parser(__doc__)
    parser.add_argument('pictures', metavar='PICTURE', nargs='+', help='image files')
    parser.add_model()
    parser.add('output', 'the image to write, such as a .png, .jpg or .webp (default: attention.png)', default='attention.png',
               metavar='FILE')
    parser.add('layer', 'layers by name, such as stages.2.1, or by number from 0 (default: all)', nargs='+', default=[],
               metavar='LAYER')
    parser.add('head', 'heads by number from 0, or mean (default: all)', nargs='+', default=[], metavar='HEAD')
    parser.add('query', "the query's place, pixels of the network's input from the left and the top (default: the middle)",
               nargs=2, type=float, metavar=('X', 'Y'))
    parser.add('side', 'of a panel, pixels (default: 220)', type=int, default=220, metavar='N')
    parser.add('npz', 'write the weights of all layers, heads and queries of the pictures', metavar='FILE')
    return parser


def choose_layers(maps, wanted):
    """The AttentionMaps that `wanted` names, in its order, or all. Raises ValueError for one that is not there."""
    by_name = {name: attention for i, attention in enumerate(maps) for name in (attention.name, str(i))}
    for name in wanted:
        if name not in by_name:
            raise ValueError(f'-layer {name}: the layers with halo attention are ' + ', '.join(a.name for a in maps))
    return [by_name[name] for name in wanted] if wanted else maps


def choose_heads(maps, wanted):
    """'mean' or head numbers. Raises ValueError for one that a layer does not have."""
    fewest = min(len(attention.probabilities) for attention in maps)
    for head in wanted:
        if head != 'mean' and not (head.isdecimal() and int(head) < fewest):
            raise ValueError(f'-head {head}: it can be mean, or 0 to {fewest - 1} as all of these layers have')
    return [head if head == 'mean' else int(head) for head in wanted]


def look(model, config, path):
    """A picture file -> uint8 pixels, AttentionMaps, (probability, label) of the likeliest class. Raises ValueError."""
    from tools.attention_maps import attention_maps

    import paddle

    import datasets
    from data import image_files
    try:
        image = image_files.read(path, config.DATA.BACKGROUND, config.DATA.MAX_PIXELS)
        pixels = datasets.eval_pixels(image, config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT)
    except Exception as error:                      # Pillow may raise nearly anything for a damaged file
        raise ValueError(f'{path}: {image_files.reason(error)}') from None
    images = paddle.to_tensor(pixels.transpose(2, 0, 1)[None])
    maps, logits = attention_maps(model, datasets.normalise(images, config.DATA.MEAN, config.DATA.STD))
    if not maps:
        raise ValueError(f'{config.MODEL.NAME} has no layer with halo attention')
    probabilities = paddle.nn.functional.softmax(logits[0]).tolist()
    return pixels, maps, max((p, label) for label, p in enumerate(probabilities))


def main(args):
    config = cli.config_of(args)
    size = config.DATA.IMAGE_SIZE
    x, y = args.query or (size / 2, size / 2)
    if not (0 <= x < size and 0 <= y < size):
        raise ValueError(f"-query {x:g} {y:g}: the network's input has the pixels 0 to {size - 1} both ways")
    if not 200 <= args.side <= 2000:                # the captions need some room
        raise ValueError(f'-side {args.side}: it can be 200 to 2000')
    if os.path.splitext(args.output)[1].lower() not in Image.registered_extensions():
        raise ValueError(f'-output {args.output}: its ending says what kind of image to write, such as .png, .jpg or .webp')
    if args.npz and not args.npz.endswith('.npz'):
        raise ValueError(f'-npz {args.npz}: its name must end with .npz')
    cli.check_outputs(args.output, args.npz)
    names = cli.class_names_or_numbers(config, args.classes)
    model, _ = cli.load_model(config)
    seen = [look(model, config, path) for path in args.pictures]
    chosen = [choose_layers(maps, args.layer) for _, maps, _ in seen]
    heads = choose_heads(chosen[0], args.head)
    rows = []
    for (pixels, _, (probability, label)), maps in zip(seen, chosen):
        caption = f'the model sees: {names[label]}, {100 * probability:.0f} %'
        rows += rows_of(pixels, caption, maps, heads, (x / size, y / size), args.side)
    picture = sheet(rows, f'{config.MODEL.NAME}: what a query attends to')
    kind = Image.registered_extensions()[os.path.splitext(args.output)[1].lower()]
    files.atomic_write(args.output, lambda file: picture.save(file, kind, quality=92, optimize=True))
    print(f'{args.output}: {len(rows)} rows; layers ' + ', '.join(f'{a.name} ({len(a.probabilities)} heads)' for a in seen[0][1]))
    if args.npz:
        arrays = {f'{i}/{a.name}': a.probabilities.numpy() for i, (_, maps, _) in enumerate(seen) for a in maps}
        files.atomic_write(args.npz, lambda file: np.savez_compressed(file, **arrays))
        print(f'{args.npz}: weights (heads, query rows, query columns, window rows, window columns) by picture number and layer')
    return 0


if __name__ == '__main__':
    parser().run(main)
