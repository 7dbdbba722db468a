"""The README and the docs: programs take their commands, their files exist, their drawings follow the code.

tests/docs/test_page_commands.py runs the commands.
"""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from pages import CHINESE, PAGES, TOOLS, commands, text_of
from runs import ROOT, records

import config
from training import results

OTHER = {                                           # programs of others, and those without arguments
    'mkdir', 'cp', 'cd', 'git', 'tar', 'python3', 'tools/make_digits.py', 'dev/ablations.py',
    'dev/bench_pipeline.py', 'dev/compare_timm/compare.py',
    'dev/cuda_kernels.py', 'dev/drawings.py', 'dev/hub_folders.py', 'dev/model_table.py', 'dev/onnx_speed.py',
    './run_demo.sh', './run_tests.sh', '.ci/run', 'exported/infer.py'}
MODULES = {'pip', 'venv', 'ops', 'paddle.distributed.launch'}                    # python -m
ROOMS = 'configs|data|dev|docs|model|ops|reporting|system|tests|tools|training'
PATH = rf'(?<![\w/.])(?:{ROOMS})/[\w/]+\.\w+'
NAME = r'(?<![\w/.\'])(datasets|data|model|training|system|tools)\.(?!py)([a-z]\w*)((?:\.\w+)*)'
ROOT_FILE = r'`(\w+\.(?:py|sh|toml))`'


@pytest.mark.parametrize('page', PAGES)
def test_programs_take_the_commands(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        while re.fullmatch(r'\w+=\S*', words[0]):
            words = words[1:]                        # variables of the environment
        if words[0] in ('python', '.venv/bin/python'):
            words = words[1:]
        if words[:3] == ['-m', 'paddle.distributed.launch', 'main_multi_gpu.py']:
            words = words[2:]
        program, *rest = words
        name = os.path.splitext(os.path.basename(program))[0]
        if name in TOOLS:
            TOOLS[name].parser().parse_args(rest)
        elif name.startswith(('main_', 'run_train', 'run_eval')):
            config.parse_args(with_existing_config(rest))
        else:
            assert program in OTHER or program == '-m' and rest[0] in MODULES, words


def with_existing_config(words):
    """Replace a config that the user has yet to write by one of ours."""
    replaced = []
    for word in ' '.join(words).replace('-cfg ', '-cfg=').split():
        is_config = word.startswith('-cfg=') and not word.startswith('-cfg=configs/')
        if is_config and not os.path.isfile(word[len('-cfg='):]):
            word = f'-cfg={ROOT}/configs/halonet_digits.yaml'
        replaced.append(word)
    return replaced


@pytest.mark.parametrize('page', [*PAGES, *CHINESE])
def test_files_of_a_page_exist(page):
    """Links and pictures, paths of the rooms, and modules and scripts of the root."""
    text = text_of(page)
    links = re.findall(r'\]\(([^):#]+)[^):]*\)', text)
    paths = [os.path.join(os.path.dirname(page), link) for link in links]
    paths += re.findall(PATH, text) + re.findall(ROOT_FILE, text)
    paths = [path for path in paths if 'NAME' not in path]     # of a file that the reader adds
    missing = [path for path in paths if not os.path.exists(os.path.join(ROOT, path))]
    assert not missing


@pytest.mark.parametrize('page', PAGES)
def test_names_of_a_page_exist(page):
    """Functions and classes that a page names with their module, such as data.image_files.read."""
    for room, first, rest in re.findall(NAME, text_of(page)):
        if room == 'datasets':
            module, names = room, [first]
        elif os.path.exists(f'{ROOT}/{room}/{first}.py'):
            module, names = f'{room}.{first}', rest.split('.')[1:]
        else:                                        # a method of a variable: model.eval
            continue
        found = importlib.import_module(module)
        for name in names:
            assert hasattr(found, name), f'{module}.{name}'
            found = getattr(found, name)


@pytest.mark.parametrize('page', PAGES)
def test_names_of_a_file_exist(page):
    """Names that a page gives with their file, such as `OPS` in `data/operations.py`."""
    for name, path in re.findall(r'`(\w+)` (?:in|of) `([\w/]+\.py)`', text_of(page)):
        assert re.search(rf'\b{name}\b', text_of(path)), f'{path} has no {name}'


def test_readme_shows_the_end_of_the_demo():
    (end,) = re.findall(r'cat <<END\n(.*?)\nEND\n', text_of('run_demo.sh'), re.S)
    text = text_of('README.md')
    (result,) = re.findall(r'\nval  (acc@1 .* images\))\n', text)
    values = {'here': '...', 'run': 'demo/run', 'data': 'demo/digits', 'result': result}
    for variable, value in values.items():
        end = end.replace(f'${variable}', value)
    assert f'\n{end}\n```' in text and '$' not in end


def test_index_lists_every_page():
    listed = set(re.findall(r'\]\(([^)]+)\)', text_of('docs/README.md')))
    pages = {page.removeprefix('docs/') for page in (*PAGES, *CHINESE) if page.startswith('docs/')}
    assert pages - {'README.md'} <= listed


def test_changelog_begins_with_the_version():
    (version,) = re.findall(r'^version: (\S+)$', text_of('CITATION.cff'), re.M)
    assert re.findall(r'^## (\S+)$', text_of('CHANGELOG.md'), re.M)[0] == version


def test_evaluation_page_lists_the_columns():
    words = re.findall(r'\w+', text_of('docs/evaluation.md').split('Its columns are')[1])
    at = [words.index(column) for column in results.COLUMNS]
    assert at == sorted(at)


def graph_of_rooms():
    """Return the pairs (room, room that it may import) of the graph in tests/test_architecture.py."""
    (graph,) = re.findall(r'^GRAPH = """\n(.*?)"""', text_of('tests/test_architecture.py'), re.S | re.M)
    pairs = []
    for line in graph.strip().splitlines():
        above, below = line.split('->')
        pairs += [(room, other) for room in above.split() for other in below.split()]
    return pairs


def test_drawing_of_the_rooms_follows_the_graph():
    """Each room of the graph is drawn once or more; an arrow goes down, or to a room on the same line."""
    (drawing,) = re.findall(r'```\n(hubconf\.py .*?)```', text_of('README.md'), re.S)
    rows = {}
    for number, line in enumerate(drawing.splitlines()):
        for name in re.findall(r'(\w+)(?:\.py|/)', line):
            rows.setdefault(name, number)
    pairs = graph_of_rooms()
    assert rows.keys() == {room for pair in pairs for room in pair}
    for room, other in pairs:
        assert rows[room] <= rows[other], (room, other)


def test_readme_describes_every_room():
    rooms = {room for pair in graph_of_rooms() for room in pair}
    tables = ' '.join(line for line in text_of('README.md').splitlines() if line.startswith('|'))
    for room in rooms:
        assert f'`{room}.py`' in tables or f'`{room}/`' in tables, room


@pytest.mark.slow
def test_fine_tuning_page(tmp_path):
    """Run its commands in a copy of the repository; the fine-tuned model is better than one from scratch."""
    copy = tmp_path / 'copy'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.*', 'demo', 'output', 'tests', '__pycache__'))
    environment = {**os.environ, 'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'}

    def shell(words):
        patterns = [word for word in words if '[' in word and word.startswith('demo')]
        line = ' '.join(word if word in patterns else shlex.quote(word) for word in words)
        done = subprocess.run(line, shell=True, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    tried = commands('docs/finetune.md')
    tried = tried[[words[1] for words in tried].index('tools/make_digits.py'):]
    tried = [words for words in tried if 'dev/drawings.py' not in words]            # it downloads 340 MB
    outputs = [shell(words).stdout for words in tried]
    assert any('fresh head for 4 classes' in output for output in outputs)
    assert os.path.getsize(copy / 'demo' / 'high.html') > 10000
    tuned = records(copy / 'demo' / 'run_high', 'val')[-1]['acc1']
    train = next(words for words in tried if '-pretrained' in words and '-eval' not in words)
    at = train.index('-pretrained')
    shell([*train[:at], *train[at + 2:], '-output', 'demo/scratch'])
    scratch = records(copy / 'demo' / 'scratch', 'val')[-1]['acc1']
    assert tuned > 90 and tuned > scratch + 5, (tuned, scratch)
