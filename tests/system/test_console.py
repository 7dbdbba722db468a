"""system/console.py: what names of files and encodings may do to consoles and logs."""
import logging
import os
import subprocess
import sys

from system.console import visible
from tools import cli
import utils

import pytest
from runs import ROOT, TINY, make_images, options, program


@pytest.mark.parametrize('text, shown', [
    ('a\x1b[31mb', r'a\x1b[31mb'), ('a\rb\x07\x7f', r'a\x0db\x07\x7f'), ('a\x9bb', r'a\x9bb'),
    ('a\u202eb', r'a\u202eb'), ('a\udcffb', r'a\udcffb'), ('a\u2028b', r'a\u2028b'),
    ('ä食 \u202f\u200d\n\t', 'ä食 \u202f\u200d\n\t')])
def test_control_characters_are_escaped(text, shown):
    assert visible(text) == shown


def test_log_escapes_control_characters(tmp_path, capsys):
    utils.setup_logger(str(tmp_path))
    try:
        utils.log.warning('left out: %s', 'a\x1b]0;title\x07\udcff.png')
    finally:
        for handler in utils.log.handlers:
            handler.close()
        utils.log.handlers.clear()
    expected = r'left out: a\x1b]0;title\x07\udcff.png'
    assert expected in (tmp_path / 'log.txt').read_text() and expected in capsys.readouterr().out
    assert isinstance(utils.log, logging.Logger)


@pytest.mark.parametrize('words', [
    ['tools/check_data.py', '{}'], ['tools/make_lists.py', '{}'], ['tools/make_lists.py', '.', '-{}'],
    ['tools/predict.py', '-pretrained', '{}.pdparams', 'x.png'], ['main_single_gpu.py', '-{}'],
    ['main_multi_gpu.py', '-cfg', '{}.yaml']])
def test_mistake_is_one_line_on_an_ascii_console(words):
    """A mistake is one line, exit code 2, on a console that has ASCII only."""
    command = [sys.executable, *(word.format('ü食\x1b[31m') for word in words)]
    environment = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 2 and b'Traceback' not in done.stderr and b'\x1b' not in done.stderr
    assert b'error: ' in done.stderr and done.stderr.isascii()


def test_run_on_an_ascii_console(tmp_path):
    data = make_images(tmp_path / 'Bär')
    (tmp_path / 'Bär' / 'val' / '3.png').rename(tmp_path / 'Bär' / 'val' / '食.png')
    path = tmp_path / 'Bär' / 'val_list.txt'
    lines = path.read_text().replace('val/3.png', 'val/食.png').replace('val/4.png', 'val/gone\x1b.png')
    path.write_text(lines, encoding='utf-8')
    words = [*options(TINY), 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0, 'DATA.ON_ERROR', 'skip']
    done = program('main_single_gpu.py', '-data_path', data, '-output', tmp_path / 'run', *words,
                   PYTHONIOENCODING='ascii')
    assert 'left out: ' in done.stdout and r'gone\x1b.png: No such file' in done.stdout
    assert 'Logging error' not in done.stderr
    assert r'gone\x1b.png' in (tmp_path / 'run' / 'log.txt').read_text(encoding='utf-8')


def test_messages_of_tools_are_escaped(capsys):
    with pytest.raises(SystemExit):
        cli.Parser('x').run(lambda args: (_ for _ in ()).throw(ValueError('a\x1b[31m')), [])
    assert capsys.readouterr().err.endswith('error: a\\x1b[31m\n')


@pytest.mark.slow                                   # three programs
def test_run_in_a_locale_without_utf_8_with_names_that_are_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b'B\xc3\xa4r \xff')
    data = make_images(folder)
    (folder / 'val' / '3.png').rename(folder / 'val' / '食.png')
    path = folder / 'val_list.txt'
    path.write_text(path.read_text().replace('val/3.png', 'val/食.png'), encoding='utf-8')
    words = [*options(TINY), 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0, 'DATA.NUM_WORKERS', 1]
    locale = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    program('main_single_gpu.py', '-data_path', data, '-output', folder / 'run', *words, **locale)
    weights = folder / 'run' / 'final.pdparams'
    done = program('main_single_gpu.py', '-data_path', data, '-output', folder / 'run', '-eval',
                   '-pretrained', weights, *words, **locale)
    assert '(11 images)' in done.stdout and 'Logging error' not in done.stderr
    done = program('tools/predict.py', '-pretrained', weights, path, '-csv', folder / 'a.csv', **locale)
    assert '11 pictures in' in done.stdout and '\\udcff' in (folder / 'a.csv').read_text(encoding='utf-8')
