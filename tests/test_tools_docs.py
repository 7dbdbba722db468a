"""Every command in the pages about the tools is one that the programs take; those of 'Tried' are run, to the letter.

Of the README, the commands of the tools.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from runs import records

import config
from tools import check_data, cli, eval_all, make_lists, predict, visualize

PAGES = ['docs/data.md', 'docs/evaluation.md', 'docs/finetune.md', 'docs/predict.md', 'README.md']
TOOLS = {'check_data': check_data, 'eval_all': eval_all, 'make_lists': make_lists, 'predict': predict, 'visualize': visualize}
OTHER = {'mkdir', 'cp', 'tools/make_digits.py'}     # nothing to be parsed


def commands(page):
    """The commands of a page's bash blocks, each as a list of words."""
    with open(os.path.join(cli.ROOT, page), encoding='utf-8') as file:
        blocks = re.findall(r'```bash\n(.*?)```', file.read(), re.S)
    lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize('page', PAGES)
def test_commands_are_such_as_the_programs_take(page, monkeypatch):
    monkeypatch.chdir(cli.ROOT)
    found = [words for words in commands(page) if page != 'README.md' or words[1:2] and words[1].startswith('tools/')]
    assert len(found) > 1
    for words in found:
        program, *rest = words[1:] if words[0] == 'python' else words
        name = os.path.splitext(os.path.basename(program))[0]
        if name in TOOLS:
            TOOLS[name].parser().parse_args(rest)
        elif name.startswith('main_'):
            made = [f'-cfg={cli.ROOT}/configs/halonet_digits.yaml' if word.endswith('/config.yaml') else word for word in rest]
            config.parse_args(['-cfg', made.pop(1).removeprefix('-cfg='), *made[1:]])    # a run's own file exists after the run
        else:
            assert program in OTHER, words


@pytest.mark.parametrize('page', PAGES)
def test_what_pages_refer_to_exists(page):
    with open(os.path.join(cli.ROOT, page), encoding='utf-8') as file:
        text = file.read()
    linked = [os.path.join(os.path.dirname(page), name) for name in re.findall(r'\]\(([^):]+)\)', text)]
    for path in re.findall(r'(?:configs|tools)/\w+\.\w+', text) + linked:
        assert os.path.exists(os.path.join(cli.ROOT, path)), path


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
    shell([*train[:at], *train[at + 2:], 'OUTPUT', 'demo/scratch'])
    scratch = records(tmp_path / 'copy' / 'demo' / 'scratch', 'val')[-1]['acc1']
    assert tuned > 90 and tuned > scratch + 5, (tuned, scratch)
