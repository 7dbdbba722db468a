"""The shape of the code: which room may import which, and that every option is read."""
import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import flatten, get_config

ROOT = Path(__file__).resolve().parents[1]
GRAPH = """
    dev -> tools
    tools main_multi_gpu main_single_gpu -> training
    training  -> halonet datasets reporting
    hubconf   -> halonet config
    halonet   -> model
    reporting -> datasets config
    datasets  -> data utils
    model     -> ops utils
    utils config data ops -> system
"""


def below(graph: str) -> dict:
    """Return {room: every room that it may import}: those that its arrows reach, and itself."""
    arrows = {}
    for line in graph.strip().splitlines():
        above, targets = line.split('->')
        for room in above.split():
            arrows[room] = set(targets.split())
    reached = {}
    for room in {*arrows, *(target for targets in arrows.values() for target in targets)}:
        found, waiting = {room}, [room]
        while waiting:
            new = arrows.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        reached[room] = found
    return reached


ROOMS = below(GRAPH)


def files_of(room: str) -> list:
    """Return the Python files of a room: a module in the root, or all that its folder holds."""
    return [ROOT / f'{room}.py'] if (ROOT / f'{room}.py').is_file() else sorted((ROOT / room).rglob('*.py'))


def imported(path: Path) -> Iterator[str]:
    """Yield the first name of everything that a file imports, at its top or within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split('.')[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative imports hide the room'
            yield node.module.split('.')[0]


@pytest.mark.parametrize('room', sorted(ROOMS))
def test_imports_point_down(room):
    assert files_of(room)
    for path in files_of(room):
        wrong = {name for name in imported(path) if name in ROOMS} - ROOMS[room]
        assert not wrong, f'{path.relative_to(ROOT)} imports {wrong}, which the graph does not allow'


def test_graph_names_every_room():
    modules = {path.stem for path in ROOT.glob('*.py')}
    packages = {path.parent.name for path in ROOT.glob('*/__init__.py')}
    assert modules | packages == ROOMS.keys()


def test_network_needs_only_paddle():
    """The model runs where Paddle is: its layers import nothing else, but for the standard library."""
    standard = {'collections', 'contextlib', 'dataclasses', 'functools', 'math', 'typing'}
    allowed = standard | {'paddle', 'model', 'ops', 'system'}
    files = ('attention', 'blocks', 'lambda_layer', 'layers', 'positions')
    names = 'halonet.py', *(f'model/{name}.py' for name in files)
    for path in map(ROOT.joinpath, names):
        assert {*imported(path)} <= allowed


def test_training_reads_the_config_in_few_functions():
    """In `run`, which `main` calls, and in functions that build a part of a run. Others get plain values."""
    readers = set()
    for path in files_of('training'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                typed = {ast.unparse(argument.annotation) for argument in arguments if argument.annotation}
                if 'config' in {argument.arg for argument in arguments} or 'CfgNode' in typed:
                    readers.add(node.name)
    assert {name for name in readers if not name.startswith('build_')} == {'main', 'run'}


def test_every_option_is_read():
    """`.KEY` stands, as code, in some module besides config.py."""
    files = [path for room in ROOMS if room != 'config' for path in files_of(room)]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names = [key.split('.')[-1] for key in flatten(get_config())]
    read_elsewhere = {'BASE', 'DATASET'}            # by config.py; for the predecessor's commands
    assert [name for name in names if name not in read | read_elsewhere] == []
    assert len(names) == len({*names})              # or the check above could mistake one option for another
