"""make_lists -table: samples from CSV, TSV and JSON, and what is wrong with such a table."""
import json

from tools import make_lists, tables

import numpy as np
import pytest
from PIL import Image
from tool_runs import call, entries

BIRDS = {'a/1.png': 'wren', 'a/2.png': 'owl', 'a/3.png': 'owl', 'b/4.png': 'wren', 'b/5.png': 'wren',
         '6.png': 'owl'}


@pytest.fixture
def birds(tmp_path):
    """A folder of six images that are not sorted by class."""
    for i, name in enumerate(BIRDS):
        path = tmp_path / 'birds' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * i, 'uint8')).save(path)
    return tmp_path / 'birds'


def listed(folder):
    """{path: class name} of both lists."""
    names = (folder / 'class_names.txt').read_text().splitlines()
    return {path: names[label] for path, label in entries(folder, 'train') + entries(folder, 'val')}


def lines(row, files=BIRDS, end='\n'):
    """A line of text for each image, by a pattern with {file} and {name}."""
    return ''.join(row.format(file=file, name=name) + end for file, name in files.items())


WINDOWS = {file.replace('/', '\\'): name for file, name in BIRDS.items()}
NUMBERS = {file[-5]: name for file, name in BIRDS.items()}
ROWS = [{'image': file, 'category': name} for file, name in BIRDS.items()]
TABLES = {
    'plain.csv': 'file,label\n' + lines('{file},{name}'),
    'excel.csv': '\ufeffFile Name;Species\r\n' + lines('{file};{name}', end='\r\n'),
    'birds.tsv': 'note\timage\tclass\n' + lines('a, b\t{file}\t{name}'),
    'quoted.csv': '"path","breed"\n' + lines('"{file}","{name}"'),
    'windows.csv': 'file,label\n' + lines('.\\{file},{name}', WINDOWS),
    'kaggle.csv': 'id,breed\n' + lines('{file},{name}', NUMBERS),
    'two.csv': 'filename,what it shows\n' + lines('{file},{name}'),
    'list.json': json.dumps(ROWS, indent=1),
    'line.json': json.dumps(ROWS),
    'map.json': json.dumps(BIRDS),
    'map_indented.json': json.dumps(BIRDS, indent=2),
    'rows.jsonl': ''.join(json.dumps(row) + '\n' for row in ROWS),
}


@pytest.mark.parametrize('name', TABLES)
def test_table_gives_the_classes(birds, name, capsys):
    table = birds.parent / name
    table.write_text(TABLES[name], newline='')
    assert call(make_lists, birds, '-table', table, '-val_share', 0.34) == 0
    assert listed(birds) == BIRDS
    assert (birds / 'class_names.txt').read_text() == 'owl\nwren\n'
    shown = capsys.readouterr().out
    assert f'columns of {table}: ' in shown and '(label)' in shown
    assert sorted(label for _, label in entries(birds, 'val')) == [0, 1]     # one of each class


def test_numbers_keep_their_order(birds):
    rows = ''.join(f'{file},{number}\n' for file, number in zip(BIRDS, (10, 2, 2, 10, 3, 3)))
    (birds.parent / 't.csv').write_text('file,label\n' + rows)
    assert call(make_lists, birds, '-table', birds.parent / 't.csv') == 0
    assert (birds / 'class_names.txt').read_text() == '2\n3\n10\n'


def test_split_is_kept_and_test_images_have_a_list(birds, capsys):
    splits = ('train', 'Train', 'valid', 'training', 'test', 'test')
    rows = ''.join(f'{file},{name},{part}\n' for (file, name), part in zip(BIRDS.items(), splits))
    (birds.parent / 't.csv').write_text('file,label,subset\n' + rows)
    assert call(make_lists, birds, '-table', birds.parent / 't.csv') == 0
    assert entries(birds, 'train') == [('a/1.png', 1), ('a/2.png', 0), ('b/4.png', 1)]
    assert entries(birds, 'val') == [('a/3.png', 0)]
    assert (birds / 'test_list.txt').read_text() == 'b/5.png 1\n6.png 0\n'
    shown = capsys.readouterr().out
    assert '2 test images in test_list.txt' in shown and 'classes without a validation image: wren' in shown


def test_images_beside_the_table_and_rows_twice_are_counted(birds, capsys):
    rows = [f'{file},{name}' for file, name in BIRDS.items()]
    (birds.parent / 't.csv').write_text('\n'.join(['file,label', *rows[:4], rows[0]]))
    assert call(make_lists, birds, '-table', birds.parent / 't.csv') == 0
    assert len(listed(birds)) == 4
    assert 'images that the table does not name (2)' in capsys.readouterr().out


def test_columns_are_named(birds):
    rows = ''.join(f'{i},{name},{file},wrong\n' for i, (file, name) in enumerate(BIRDS.items()))
    (birds.parent / 't.csv').write_text('id,truth,where,label\n' + rows)
    assert call(make_lists, birds, '-table', birds.parent / 't.csv', '-columns', 'where', 'truth') == 0
    assert listed(birds) == BIRDS


@pytest.mark.parametrize('content, message', [
    ('file,label\na/1.png,wren\nno.png,owl\n', 't.csv:3 no.png'),
    ('file,label\na/1.png,wren\na/2.png,\n', 't.csv:3: no label in the column label'),
    ('file,label\na/1.png,wren\na/1.png,owl\n', 't.csv:3: a/1.png is owl here and wren in line 2'),
    ('file,label\na/1.png,wren,2\n', 't.csv:2: 3 cells, and the first line has 2: file, label'),
    ('file,file\na/1.png,wren\n', 't.csv:1: a column occurs twice'),
    ('a,b,c\n1,2,3\n', 't.csv has the columns a, b, c: say which of them hold the files and the labels'),
    ('file,label,split\na/1.png,wren,holdout\n', "t.csv:2: the split is 'holdout'; it can be"),
    ('file,label,split\na/1.png,wren,train\na/2.png,owl,\n', 'some rows have a split and others have none'),
    ('file,label,split\na/1.png,wren,val\na/2.png,owl,val\n', 'has no row for training'),
    ('file,label\n', 't.csv: no row'), ('', 't.csv: no row'),
    ('file,label\na/1.png,wren\na/2.png,wren\n', 'expected two classes or more, found 1'),
    ('file,label\n"a/1.png,wren\n', 't.csv:2: ')])
def test_mistake_in_a_table_is_one_line(birds, content, message, capsys):
    (birds.parent / 't.csv').write_text(content)
    assert call(make_lists, birds, '-table', birds.parent / 't.csv') == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not (birds / 'train_list.txt').exists()


@pytest.mark.parametrize('content', [
    '{', '3', '"text"', '[1, 2]', '[{"file": ["a"], "label": 1}]', '[' * 100_000,
    '[{"file": "a.png", "label": 1}, {"file": "b.png"}]'])
def test_json_without_rows_is_refused(tmp_path, content):
    (tmp_path / 't.json').write_text(content)
    with pytest.raises(ValueError, match='t.json: '):
        tables.read_table(str(tmp_path / 't.json'), ['a.png', 'b.png'])


def test_binary_table_is_refused(tmp_path):
    (tmp_path / 't.csv').write_bytes(b'\xff\xfe\0')
    with pytest.raises(ValueError, match='t.csv: not a UTF-8 text file'):
        tables.read_table(str(tmp_path / 't.csv'), [])


def test_name_of_two_images_is_not_guessed():
    find = tables.Finder(['a/1.png', 'b/1.png', 'b/2.png'])
    assert [find(text) for text in ('a/1.png', './a/1.png', '1.png', '1', '2', '2.png', 'c/2.png', '')] == [
        'a/1.png', 'a/1.png', '', '', 'b/2.png', 'b/2.png', 'b/2.png', '']


@pytest.mark.parametrize('words, message', [
    (['-columns', 'a', 'b'], '-columns names those of a -table; give it'),
    (['-table', 't.csv', '-columns', 'file', 'nothing'], 'expected FILE LABEL or FILE LABEL SPLIT'),
    (['-table', 't.csv', '-columns', 'file'], 'expected FILE LABEL or FILE LABEL SPLIT'),
    (['-table', 't.csv', '-val_labels', 'x'], 'leave -val_labels and -synsets out')])
def test_options_that_do_not_go_together(birds, words, message, monkeypatch, capsys):
    monkeypatch.chdir(birds.parent)
    (birds.parent / 't.csv').write_text(TABLES['plain.csv'])
    assert call(make_lists, birds, *words) == 2
    assert message in capsys.readouterr().err
