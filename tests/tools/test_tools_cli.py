"""Check what all tools have in common: their options and help, errors in one line, the progress bar."""
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios

from tools import cli

import pytest
from pages import TOOLS
from runs import ROOT, program

from dev import bench_pipeline, model_table

ALL = {**TOOLS, 'bench_pipeline': bench_pipeline, 'model_table': model_table}


def folder(name):
    return ALL[name].__name__.split('.')[0]


@pytest.mark.parametrize('name', ALL)
def test_options_and_help(name, capsys):
    parser = ALL[name].parser()
    for action in parser._actions:
        words = action.option_strings
        if words and words[0] != '-h':
            name_alone = words[1].strip('-')
            assert words == [f'-{name_alone}', f'--{name_alone}']
        assert action.help or not words, action.dest
        if type(action.default) in (int, float):
            assert 'default: ' in action.help, action.dest
    with pytest.raises(SystemExit) as stop:
        parser.run(None, ['-h'])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f'python {folder(name)}/{name}.py' in text
    assert max(len(line) for line in text.splitlines()) <= 130


@pytest.mark.parametrize('name', ['predict', 'probe', 'visualize', 'make_lists', 'check_data', 'eval_all'])
def test_help_answers_with_examples(name):
    done = program(f'{ROOT}/tools/{name}.py', '-h')
    assert done.stdout.count(f'python tools/{name}.py') >= 2 and done.stderr == ''
    listed = re.findall(r'^  (-\w+)[^,]*, (-\S+)', done.stdout, re.M)
    assert len(listed) > 2 and all(long == f'-{short}' or short == '-h' for short, long in listed)


@pytest.mark.parametrize('error, line', [
    (ValueError('this is wrong'), 'this is wrong'),
    (FileNotFoundError(2, 'No such file', 'a b.png'), 'a b.png: No such file'),
    (OSError('no number'), 'no number')])
def test_error_is_one_line(error, line, capsys):
    def fail(args):
        raise error
    with pytest.raises(SystemExit) as stop:
        cli.Parser('x').run(fail, [])
    assert stop.value.code == 2
    assert [text.split(': error: ')[1] for text in capsys.readouterr().err.splitlines()] == [line]


@pytest.mark.parametrize('name', [
    'predict', 'probe', 'visualize', 'metrics', 'report', 'follow', 'make_lists', 'check_data', 'eval_all'])
def test_help_does_not_import_paddle(name):
    command = [sys.executable, '-X', 'importtime', f'{folder(name)}/{name}.py', '-h']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    modules = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and 'argparse' in modules and 'paddle' not in modules


def test_report_does_not_import_paddle(trained, tmp_path):
    command = [sys.executable, '-X', 'importtime', 'tools/report.py', trained, '-output', tmp_path / 'a.html']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    modules = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and 'jinja2' in modules and 'paddle' not in modules


@pytest.mark.parametrize('terminal', [False, True])
def test_progress_bar_is_shown_on_a_terminal_only(terminal):
    read, write = os.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))          # rows and columns
    code = "from tools import cli; print(list(cli.progress(iter('abc'), 3, 'reading')))"
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=write, text=True)
    os.write(write, b'end')
    os.close(write)
    shown = os.read(read, 1 << 16).decode()
    os.close(read)
    assert done.stdout == "['a', 'b', 'c']\n"
    if terminal:
        assert 'reading: 100%' in shown and '3/3' in shown
    else:
        assert shown == 'end'
