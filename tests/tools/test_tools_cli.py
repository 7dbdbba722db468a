"""What all tools share: options with one dash or two, help that answers at once, one line and status 2 for a mistake."""
import subprocess
import sys

from tools import cli

import pytest
from pages import TOOLS
from runs import ROOT

from dev import bench_pipeline, model_table

ALL = {**TOOLS, 'bench_pipeline': bench_pipeline, 'model_table': model_table}


def folder(name):
    return ALL[name].__name__.split('.')[0]


@pytest.mark.parametrize('name', ALL)
def test_options_and_help(name, capsys):
    parser = ALL[name].parser()
    for action in parser._actions:
        words = action.option_strings
        assert not words or words[0] == '-h' or [f'-{words[1].strip("-")}', f'--{words[1].strip("-")}'] == words, words
        assert action.help or not words, action.dest
        if type(action.default) in (int, float):
            assert 'default: ' in action.help, action.dest
    with pytest.raises(SystemExit) as stop:
        parser.run(None, ['-h'])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f'python {folder(name)}/{name}.py' in text and max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize('error, line', [
    (ValueError('this is wrong'), 'this is wrong'), (FileNotFoundError(2, 'No such file', 'a b.png'), 'a b.png: No such file'),
    (OSError('no number'), 'no number')])
def test_a_mistake_is_one_line(error, line, capsys):
    def fail(args):
        raise error
    with pytest.raises(SystemExit) as stop:
        cli.Parser('x').run(fail, [])
    assert stop.value.code == 2
    assert [text.split(': error: ')[1] for text in capsys.readouterr().err.splitlines()] == [line]


@pytest.mark.parametrize('name', ['predict', 'visualize', 'report', 'make_lists', 'check_data', 'eval_all'])
def test_help_does_without_paddle(name):
    command = [sys.executable, '-X', 'importtime', f'{folder(name)}/{name}.py', '-h']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    modules = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and 'argparse' in modules and 'paddle' not in modules
