"""The page of a run, or the comparison of several, as a file."""

from system import files

from reporting import page
from reporting.runs import read_run


def write(folders, path, classes=None):
    """Make the HTML file `path` about one run folder, or about several side by side; `classes`: a file of class names.

    Raises ValueError for a folder that holds no run, OSError where `path` cannot be written.
    """
    runs = [read_run(folder, classes) for folder in folders]
    text = page.run_page(runs[0]) if len(runs) == 1 else page.comparison(runs)
    files.atomic_write(path, lambda file: file.write(text.encode('utf-8', 'replace')))
    return path
