"""dev/benchmark.py measures every case in a process of its own, and reports failed and differing ones."""
import csv
import mmap

import pytest
import reference as ref

from dev import benchmark

pytestmark = pytest.mark.slow                       # each case starts Paddle anew
TINY = [*map(str, ref.TINY), 'DATA.IMAGE_SIZE', '32']


def run(monkeypatch, tmp_path, *words):
    """The rows of the table that the tool writes for a tiny model and batch 2, each measured once."""
    path = tmp_path / 'table.csv'
    config = tmp_path / 'tiny.yaml'
    config.write_text('{}\n')
    words = [words[0], '-cfg', str(config), *words[1:], '-batch', '2', '-rounds', '1', '-runs', '1',
             '-csv', str(path), '-opts', *TINY]
    monkeypatch.setattr('sys.argv', [benchmark.__file__, *words])
    assert benchmark.main(benchmark.parser().parse_args(words)) == 0
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def test_training_step_is_measured(monkeypatch, tmp_path):
    rows = run(monkeypatch, tmp_path, 'train')
    assert [row['engine'] for row in rows] == ['fused', 'composed']
    assert all(float(row['images_per_s']) > 0 for row in rows) and rows[0]['ratio'] == '1.0'


def test_launches_and_waits_of_a_step_are_counted(monkeypatch, tmp_path):
    composed, fused = run(monkeypatch, tmp_path, 'train', '-profile', '-attention', 'composed', 'fused')
    assert 100 < int(composed['launches']) < 1000 and composed['launches'] != fused['launches']
    assert composed['waits'] == fused['waits'] == '0'                        # there is no device to wait for


def test_evaluation_is_measured_and_broken_files_are_left_out(monkeypatch, tmp_path, capsys):
    (tmp_path / 'model.onnx').write_text('no model')
    rows = run(monkeypatch, tmp_path, 'eval', '-exported', str(tmp_path))
    assert [row['engine'] for row in rows] == ['eager fused', 'eager composed']
    output = capsys.readouterr().out
    assert 'onnxruntime: left out: ' in output and 'OpenVINO: left out: ' in output and 'differ' not in output


def test_differing_results_are_reported(monkeypatch, capsys):
    def answer(i, name):
        return {'seconds': [1.0], 'mib': 0, 'result': [2.0, 1.0 + i * 1e-3]}

    case = benchmark.Case('a', 1, {}, None)
    monkeypatch.setattr(benchmark, 'ask', answer)
    cases = [case, benchmark.Case('b', 1, {}, None)]
    rows = benchmark.compare(cases, cases, benchmark.parser().parse_args(['layer', '-rounds', '2']))
    assert len(rows) == 2 and 'b: results differ by 5.0e-04 of the largest' in capsys.readouterr().out


@pytest.mark.parametrize('result', [[float('nan'), 2.0], [2.0, float('nan')]])
def test_nan_is_a_difference(result):
    assert not benchmark.difference(result, [2.0, 1.0]) <= 1e-4


@pytest.mark.parametrize('words, message', [
    (['-pretrained', 'nowhere'], 'nowhere: no such file'), (['-csv', 'nowhere/t.csv'], 'cannot be written'),
    (['-also', 'name'], '-also name: expected NAME=FILE'),
    (['-precision', 'float16'], '-precision: a CPU computes in float32 only'),
    (['-exported', '.'], 'neither model.json nor model.onnx')])
def test_mistakes_are_reported_before_the_measurements(monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, 'ask', lambda *_: pytest.fail('it measures'))
    (tmp_path / 'tiny.yaml').write_text('{}\n')
    with pytest.raises((ValueError, OSError), match=message):
        benchmark.main(benchmark.parser().parse_args(['eval', '-cfg', 'tiny.yaml', *words, '-opts', *TINY]))


def test_exported_folder_without_onnx_is_measured(monkeypatch, tmp_path):
    (tmp_path / 'model.json').write_text('no model')
    asked = []
    monkeypatch.setattr(benchmark, 'ask', lambda i, name: asked.append(name))
    with pytest.raises(FileNotFoundError):          # no rows, so no table to read
        run(monkeypatch, tmp_path, 'eval', '-exported', str(tmp_path))
    assert 'Paddle Inference' in asked and not any('onnxruntime' in name for name in asked)


def touch(size):
    """Take memory from the kernel, and give it back."""
    with mmap.mmap(-1, size) as memory:
        memory.write(b'1' * size)


def test_memory_peak_is_that_of_the_work():
    touch(2 ** 26)
    before = benchmark.resident_mib(reset=True)     # what was before does not count
    touch(2 ** 25)
    assert 31 <= benchmark.resident_mib() - before < 72     # and the bytes that are written to it
