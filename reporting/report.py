"""The page of a run, or the comparison of several, as a file."""
import utils  # isort: skip  (first: it prepares for Paddle's import)

from reporting import page
from reporting.runs import read_run


def write(folders, path, classes=None):
    """Make the HTML file `path` about one run folder, or about several side by side; `classes`: a file of class names.

    Raises ValueError for a folder that holds no run, OSError where `path` cannot be written.
    """
    runs = [read_run(folder, classes) for folder in folders]
    text = page.run_page(runs[0]) if len(runs) == 1 else page.comparison(runs)
    utils.atomic_write(path, lambda file: file.write(text.encode('utf-8', 'replace')))
    return path
