"""Every command in the README and the docs is one that the programs take; see tests/docs/test_docs_run.py for running them."""
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from runs import records

import config
from dev import benchmark
from tools import check_data, cli, eval_all, export, make_lists, port_weights, predict, report, visualize

PAGES = ['README.md', 'CONTRIBUTING.md', *sorted(f'docs/{name}' for name in os.listdir(os.path.join(cli.ROOT, 'docs'))
                                                  if name.endswith('.md'))]
TOOLS = {module.__name__.split('.')[-1]: module for module in
         (benchmark, check_data, eval_all, export, make_lists, port_weights, predict, report, visualize)}
OTHER = {                                           # whose arguments are not ours, or are none
    'mkdir', 'cp', 'cd', 'git', 'python3', 'tools/make_digits.py', 'dev/bench_pipeline.py', 'dev/model_table.py',
    './run_demo.sh', './run_tests.sh', '.ci/run'}
INLINE = r'`((?:[A-Z_]+=\S+\s)*(?:python (?:-m \w|tools/|main_)|\./run_\w+\.sh)[^`]*)`'
MODULES = {'pip', 'venv', 'ops', 'paddle.distributed.launch'}                    # python -m


def commands(page):
    """The commands of a page's bash blocks, then those in its text, each as a list of words."""
    with open(os.path.join(cli.ROOT, page), encoding='utf-8') as file:
        text = file.read()
    blocks = re.findall(r'```bash\n(.*?)```', text, re.S)
    lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines() if line.strip()]
    lines += [' '.join(code.split()) for code in re.findall(INLINE, text)]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.mark.parametrize('page', PAGES)
def test_commands_are_such_as_the_programs_take(page, monkeypatch):
    monkeypatch.chdir(cli.ROOT)
    for words in commands(page):
        while re.fullmatch(r'\w+=\S*', words[0]):
            words = words[1:]                        # variables of the environment
        words = words[1:] if words[0] in ('python', '.venv/bin/python') else words
        if words[:3] == ['-m', 'paddle.distributed.launch', 'main_multi_gpu.py']:
            words = words[2:]
        program, *rest = words
        name = os.path.splitext(os.path.basename(program))[0]
        if name in TOOLS:
            TOOLS[name].parser().parse_args(rest)
        elif name.startswith(('main_', 'run_train', 'run_eval')):
            config.parse_args(with_a_config_that_exists(rest))
        else:
            assert program in OTHER or program == '-m' and rest[0] in MODULES, words


def with_a_config_that_exists(words):
    """Arguments of a main program in which the user's own config is one of ours: his exists when he has written it."""
    words = ' '.join(words).replace('-cfg ', '-cfg=').split()
    ours = f'-cfg={cli.ROOT}/configs/halonet_digits.yaml'
    return [ours if word.startswith('-cfg=') and not os.path.isfile(word[5:]) and not word.startswith('-cfg=configs/') else word
            for word in words]


@pytest.mark.parametrize('page', PAGES)
def test_what_pages_refer_to_exists(page):
    with open(os.path.join(cli.ROOT, page), encoding='utf-8') as file:
        text = file.read()
    linked = [os.path.join(os.path.dirname(page), name) for name in re.findall(r'\]\(([^):]+)\)', text)]
    for path in re.findall(r'(?:configs|tools)/\w+\.\w+', text) + linked:
        assert os.path.exists(os.path.join(cli.ROOT, path)), path


def test_the_end_of_the_demo_is_as_the_readme_shows_it():
    with open(os.path.join(cli.ROOT, 'run_demo.sh'), encoding='utf-8') as file:
        (end,) = re.findall(r'cat <<END\n(.*?)\nEND\n', file.read(), re.S)
    with open(os.path.join(cli.ROOT, 'README.md'), encoding='utf-8') as file:
        text = file.read()
    (result,) = re.findall(r'\nval  (acc@1 .* images\))\n', text)
    for variable, value in {'here': '...', 'run': 'demo/run', 'data': 'demo/digits', 'result': result}.items():
        end = end.replace(f'${variable}', value)
    assert f'\n{end}\n```' in text and '$' not in end


@pytest.mark.slow
def test_fine_tuning_as_the_page_says(tmp_path):
    """In a copy of the repository, as a new user would; and better than from scratch."""
    wanted = shutil.ignore_patterns('.*', 'demo', 'output', 'tests', '__pycache__')
    shutil.copytree(cli.ROOT, tmp_path / 'copy', ignore=wanted)
    environment = {**os.environ, 'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'}

    def shell(words):
        line = ' '.join(word if '[' in word and word.startswith('demo') else shlex.quote(word) for word in words)
        done = subprocess.run(line, shell=True, cwd=tmp_path / 'copy', env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    tried = commands('docs/finetune.md')
    tried = tried[[words[1] for words in tried].index('tools/make_digits.py'):]
    outputs = [shell(words).stdout for words in tried]
    assert any('fresh head for 4 classes' in output for output in outputs)
    assert os.path.getsize(tmp_path / 'copy' / 'demo' / 'high.html') > 10000
    tuned = records(tmp_path / 'copy' / 'demo' / 'run_high', 'val')[-1]['acc1']
    train = next(words for words in tried if '-pretrained' in words and '-eval' not in words)
    at = train.index('-pretrained')
    shell([*train[:at], *train[at + 2:], '-output', 'demo/scratch'])
    scratch = records(tmp_path / 'copy' / 'demo' / 'scratch', 'val')[-1]['acc1']
    assert tuned > 90 and tuned > scratch + 5, (tuned, scratch)
