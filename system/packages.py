"""Report a missing Python package in one line instead of a traceback: the programs import this module before any package."""
import os
import shlex
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = os.path.join(ROOT, '.venv')
NAMES = {'PIL': 'pillow', 'cv2': 'opencv-python-headless', 'paddle': 'paddlepaddle', 'yaml': 'pyyaml'}   # as pip knows them


def is_ours(module: str) -> bool:
    """Return True for a module or package of this repository."""
    return os.path.exists(os.path.join(ROOT, module)) or os.path.exists(os.path.join(ROOT, f'{module}.py'))


def advice() -> str:
    """Return what makes the packages available to the user's shell."""
    activate = os.path.join(ENVIRONMENT, 'bin', 'activate')
    if os.path.realpath(sys.prefix) == os.path.realpath(ENVIRONMENT) or not os.path.exists(activate):
        install = shlex.join([sys.executable, '-m', 'pip', 'install', '-r', os.path.join(ROOT, 'requirements.txt')])
        return f'install the requirements by {install}'
    return f'first: source {shlex.quote(activate)}'


def report(kind, error, traceback):
    """An excepthook: one line and exit code 2 for a missing package, the usual traceback for everything else."""
    module = (getattr(error, 'name', None) or '').partition('.')[0]
    if not issubclass(kind, ModuleNotFoundError) or not module or is_ours(module):
        return sys.__excepthook__(kind, error, traceback)
    print(f'error: the package {NAMES.get(module, module)} is missing in {sys.executable}; {advice()}', file=sys.stderr)
    sys.exit(2)                                     # a mistake that another start would meet again


sys.excepthook = report
