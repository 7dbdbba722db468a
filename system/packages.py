"""Report a missing Python package in one line, not a traceback. Programs import this module first."""
import os
import shlex
import sys
from types import TracebackType
from typing import Optional

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = os.path.join(ROOT, '.venv')
NAMES = {                                           # of modules whose package has another name for pip
    'PIL': 'pillow', 'cv2': 'opencv-python-headless', 'paddle': 'paddlepaddle', 'yaml': 'pyyaml'}


def is_ours(module: str) -> bool:
    """True for a module or package of this repository."""
    path = os.path.join(ROOT, module)
    return os.path.exists(path) or os.path.exists(f'{path}.py')


def advice() -> str:
    """Return the command that makes the packages available to the user's shell."""
    activate = os.path.join(ENVIRONMENT, 'bin', 'activate')
    if os.path.realpath(sys.prefix) == os.path.realpath(ENVIRONMENT) or not os.path.exists(activate):
        requirements = os.path.join(ROOT, 'requirements.txt')
        install = shlex.join([sys.executable, '-m', 'pip', 'install', '-r', requirements])
        return f'install the requirements by {install}'
    return f'first: source {shlex.quote(activate)}'


def report(kind: type[BaseException], error: BaseException, traceback: Optional[TracebackType]) -> None:
    """Handle an uncaught exception: one line and exit code 2 for a missing package, else a traceback."""
    module = (getattr(error, 'name', None) or '').partition('.')[0]
    if not issubclass(kind, ModuleNotFoundError) or not module or is_ours(module):
        return sys.__excepthook__(kind, error, traceback)
    package = NAMES.get(module, module)
    print(f'error: the package {package} is missing in {sys.executable}; {advice()}', file=sys.stderr)
    sys.exit(2)                                     # a mistake that another start would meet again


sys.excepthook = report
