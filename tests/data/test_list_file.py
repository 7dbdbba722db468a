"""data/list_file.py: the rules of list files, against reading line by line; numbers of lines; memory."""
import os
import re
from pathlib import Path

import numpy as np
import pytest

from data import list_file
from data.list_file import read_list


def write(folder, content, name='list.txt'):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_comments_spaces_and_line_endings_are_accepted(tmp_path):
    content = '\ufeffa/x 1.JPEG 3\r\n\r\n# a comment 7\r\n  b/ü..y.png\t0  \r\nc/../d.png 9'
    samples = read_list(write(tmp_path, content), '/data', 10)
    assert [samples.name(i) for i in range(3)] == ['a/x 1.JPEG', 'b/ü..y.png', 'c/../d.png']
    assert len(samples) == 3
    assert samples.labels.tolist() == [3, 0, 9] and samples.labels.dtype == np.int64
    assert [samples.where(i)[-2:] for i in range(3)] == [':1', ':4', ':5']
    assert samples.path(0) == '/data/a/x 1.JPEG'


@pytest.mark.parametrize('line, reason', [
    ('a.png', 'no label'), ('17', 'no label'), ('a b.png', "label 'b.png' is not a whole number"),
    ('a.png 1.0', "label '1.0'"),
    ('a.png 1_0', "label '1_0'"), ('a.png ١', r"label '\\u0661'"),
    ('a.png 10', r'label 10 is not in 0\.\.9'),
    ('a.png -1', r'label -1 is not in 0\.\.9'), ('/a.png 1', 'absolute'),
    ('../a.png 1', 'leaves DATA.DATA_PATH'),
    ('a/../../b.png 1', 'leaves DATA.DATA_PATH')])
def test_bad_lines_are_named(tmp_path, line, reason):
    path = write(tmp_path, f'good.png 1\n\n{line}\n')
    with pytest.raises(ValueError, match=re.escape(f'{path}:3: ') + f'.*{reason}'):
        read_list(path, '/data', 10)


def test_bad_lines_are_reported_together(tmp_path):
    for count, words in ((1, '1 bad line'), (9, '9 bad lines'), (10, 'at least 10 bad lines'),
                         (23, 'at least 10 bad lines')):
        with pytest.raises(ValueError, match=f': {words}\n') as error:
            read_list(write(tmp_path, 'good.png 1\n' + 'bad.png x\n' * count), '/data', 10)
        assert str(error.value).count('is not a whole number') == min(count, 10)
        assert 'list.txt:2:' in str(error.value)


@pytest.mark.parametrize('line', ['bad.png x', 'bad.png 99', '/bad.png 1', 'ü'])
def test_reading_stops_at_the_tenth_bad_line(tmp_path, monkeypatch, line):
    calls = []
    parse = list_file._parse_line
    monkeypatch.setattr(list_file, '_parse_line', lambda *args: calls.append(1) or parse(*args))
    monkeypatch.setattr(list_file, 'CHUNK', 1000)
    with pytest.raises(ValueError, match='at least 10 bad lines'):
        read_list(write(tmp_path, f'{line}\n' * 2000), '/data', 10)
    assert len(calls) == 10


@pytest.mark.parametrize('content, reason', [
    ('', 'empty'), ('# nothing\n\n', 'empty'), (b'\xff\xd8\xff\xe0 1\n', 'UTF-8'),
    ('a.png 1\n'.encode('utf-16'), 'UTF-8'),
    (bytes(1000), 'no label')])
def test_other_files_are_refused_as_lists(tmp_path, content, reason):
    with pytest.raises(ValueError, match=reason) as error:
        read_list(write(tmp_path, content), '/data', 10)
    assert 'list.txt' in str(error.value) and not isinstance(error.value, UnicodeError)
    assert len(str(error.value)) < 1000 and '\0' not in str(error.value)


def test_missing_list_is_refused(tmp_path):
    for path in (tmp_path / 'none.txt', tmp_path):
        with pytest.raises(FileNotFoundError, match='relative/path label'):
            read_list(str(path), '/data', 10)


def read_by_lines(path, num_classes):
    """The rules of a list file, one line at a time: [(name, label, line number)], or the error's text."""
    rows, bad = [], 0
    with open(path, encoding='utf-8-sig') as file:
        for number, line in enumerate(file, 1):
            words = re.fullmatch(r'(?:(.*\S)\s+)?([^\s]+)', line.strip(), re.DOTALL)
            if not line.strip() or line.strip()[0] == '#':
                continue
            name, label = words.groups() if words else (None, '')
            good = (name is not None and re.fullmatch('[+-]?[0-9]{1,18}', label)
                    and 0 <= int(label) < num_classes
                    and name[0] != '/' and os.path.normpath(name).split('/')[0] != '..')
            bad += not good
            rows.append((name, int(label) if good else None, number))
    if bad:
        return f'{bad} bad lines?' if bad < 10 else 'at least 10 bad lines'
    return rows or 'the list is empty'


NAMES = ['a.png', 'a b.png', 'ü.png', '\u3000x', 'x\u00a0', 'x\x1c', 'a\tb', '.', '..a', 'a..', 'a/../b',
         '#a', 'a#', '7',
         'a 7', 'é', 'a\x0bb']
BAD_NAMES = ['/a', '../a', '', '..']
LABELS = ['0', '7', '007', '+3', '000000000000001', '5 ', '5\u00a0', '5\x0c']
BAD_LABELS = ['10', '-1', 'x', '1.0', '', '1234567890', '99999999999999999999', '\u0661']
BETWEEN = [' ', '\t', '  ', ' \t', '\u00a0', '\u3000']
OTHER = ['', '  ', '# no sample 7', ' #', '\x0c', '\t', '\u3000']
ENDS = ['\n', '\r\n', '\r', '\n\n']


@pytest.mark.parametrize('seed', range(60))
def test_list_equals_reading_line_by_line(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    usual, bad = rng.choice([0.0, 0.5, 0.9]), rng.choice([0.0, 0.0, 0.3])
    content = '\ufeff' if seed % 3 == 0 else ''
    for _ in range(rng.integers(1, 40)):
        name = rng.choice(BAD_NAMES if rng.random() < bad else NAMES)
        label = rng.choice(BAD_LABELS if rng.random() < bad else LABELS)
        if rng.random() < usual:
            line = f'n/{rng.integers(99)}.png {rng.integers(10)}'
        else:
            line = f'{name}{rng.choice(BETWEEN)}{label}'
        content += rng.choice(OTHER) if rng.random() < 0.2 else line
        content += rng.choice(ENDS) if seed % 2 else '\n'
    content = content.rstrip('\n') if seed % 5 == 0 else content
    path = tmp_path / 'list.txt'
    path.write_bytes(content.encode())
    expected = read_by_lines(path, 10)
    for chunk in (1, 50, 1 << 24):
        monkeypatch.setattr(list_file, 'CHUNK', chunk)
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                read_list(str(path), '/data', 10)
            continue
        samples = read_list(str(path), '/data', 10)
        lines = [int(samples.where(i).rpartition(':')[2]) for i in range(len(samples))]
        assert list(zip(map(samples.name, range(len(samples))), samples.labels.tolist(), lines)) == expected


def test_numbers_of_bad_lines_count_over_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(list_file, 'CHUNK', 8)
    (tmp_path / 'list.txt').write_text('a.png 1\n\n# x\nb.png 2\nbad\nc.png 3\n\nd.png 10\n')
    with pytest.raises(ValueError,
                       match=r'2 bad lines\n.*list.txt:5: no label.*\n.*list.txt:8: label 10 is not in 0..9'):
        read_list(str(tmp_path / 'list.txt'), '/data', 10)


def private_bytes():
    text = Path('/proc/self/smaps_rollup').read_text()
    return 1024 * sum(int(number) for number in re.findall(r'^Private_\w+: +(\d+) kB', text, re.M))


@pytest.mark.skipif(not os.path.exists('/proc/self/smaps_rollup'),
                    reason='needs /proc/self/smaps_rollup (Linux)')
def test_data_processes_share_the_list(tmp_path):
    """A forked process that reads every name in random order gets hardly any memory of its own."""
    count = 200_000
    path = tmp_path / 'list.txt'
    path.write_text(''.join(f'train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG {i % 1000}\n'
                            for i in range(count)))
    samples = read_list(str(path), '/data', 1000)
    arrays = samples.starts, samples.lengths, samples.labels, samples.gaps
    size = len(samples.text) + sum(array.nbytes for array in arrays)
    assert size <= path.stat().st_size + 20 * count
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = private_bytes()
        for i in range(count):
            i = i * 7919 % count                    # a prime: every sample, all over the list
            samples.path(i), samples.labels[i]
        os.write(writer, str(private_bytes() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reader, 100)) < size / 4
