"""Make the HTML of the page of tools/predict.py, one self-contained file, by templates/predictions.html."""
import os
from collections import Counter
from typing import Any, Optional, Protocol

from system import sizes

import numpy as np

from reporting import pictures
from reporting.templates import render

KINDS = {'wrong': 'wrong', 'right': 'correct', 'unlabelled': 'without a label', 'broken': 'cannot be read'}


class Prediction(Protocol):
    """A picture of tools/predict.py with its prediction or its error."""
    path: str
    label: Optional[int]
    error: str
    top: list[tuple[int, float]]                    # (label, probability), the most probable first
    pixels: np.ndarray                              # uint8 (H, W, C), the network's input


def page(predictions: list[Any], names: list[str], facts: dict[str, Any], summary: str, count: int) -> str:
    """Return the page about the first of `count` predictions.

    `names` are the class names. `facts` are those of the JSON, `summary` is the last line of the console.
    Paths are shown below the folder that all have in common: the page may be sent to somebody.
    """
    folder, paths = shown_paths(predictions)
    cards = [card(prediction, path, names) for prediction, path in zip(predictions, paths)]
    counts = Counter(shown['kind'] for shown in cards)
    return render(
        'predictions.html',
        title=f'{facts["model"]}: predictions for {folder}',
        script='arrange.js',
        summary=summary,
        shown=len(predictions),
        count=count,
        weights='/'.join(facts['weights'].split('/')[-2:]),
        image_size=sizes.as_text(facts['image_size']),
        kinds=KINDS,
        counts=counts,
        cards=cards,
    )


def kind_of(prediction: Prediction) -> str:
    """Return the key of a prediction in KINDS."""
    if prediction.error:
        return 'broken'
    if prediction.label is None:
        return 'unlabelled'
    if prediction.label == prediction.top[0][0]:
        return 'right'
    return 'wrong'


def shown_paths(predictions: list[Any]) -> tuple[str, list[str]]:
    """Return the name of the folder that all pictures lie in, and their paths inside of it."""
    paths = [os.path.abspath(prediction.path) for prediction in predictions]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return os.path.basename(folder), [os.path.relpath(path, folder) for path in paths]


def card(prediction: Prediction, path: str, names: list[str]) -> dict[str, Any]:
    """Return the values of the card of a picture, which is shown as `path`."""
    shown = {'kind': kind_of(prediction), 'path': path, 'error': prediction.error, 'confidence': 0.0}
    if prediction.error:
        return shown
    return {
        **shown,
        'confidence': prediction.top[0][1],
        'picture': pictures.embed(pictures.as_picture(prediction.pixels)),
        'label': '' if prediction.label is None else names[prediction.label],
        'top': [(names[label], 100 * probability) for label, probability in prediction.top],
    }
