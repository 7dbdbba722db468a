"""Write the page of a run, or the comparison of several, to a file."""
from typing import Optional

from system import files

from reporting import comparison, page
from reporting.runs import read_run


def write(folders: list[str], path: str, classes: Optional[str] = None) -> str:
    """Write the HTML file `path` about one run folder, or about several side by side; return `path`.

    `classes` is a file of class names. Raises ValueError for a folder that holds no run, OSError where `path`
    cannot be written.
    """
    runs = [read_run(folder, classes) for folder in folders]
    text = page.run_page(runs[0]) if len(runs) == 1 else comparison.compare_page(runs)
    files.atomic_write(path, lambda file: file.write(text.encode('utf-8', 'replace')))
    return path
