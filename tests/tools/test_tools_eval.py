"""Check the results tables of -eval and eval_all against single evaluations, also after a failed one."""
import csv
import re

from tools import cli, eval_all

import numpy as np
import paddle
import pytest
import yaml
from runs import TINY, make_images, options, program

from config import get_config
from halonet import build_halonet
from model import weights
from training import engine, results


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Images, a cfg and weights in one folder, and a list of three models of which one does not exist."""
    folder = tmp_path_factory.mktemp('eval') / 'data'
    make_images(folder)
    config = get_config(None, TINY)
    (folder / 'tiny.yaml').write_text(config.dump())
    paddle.seed(1)
    paddle.save(build_halonet(config).state_dict(), str(folder / 'a.pdparams'))
    models = [{'cfg': 'tiny.yaml', 'pretrained': 'a.pdparams', 'image_size': [16, 32], 'crop_pct': 0.5},
              {'cfg': 'tiny.yaml', 'pretrained': 'none.pdparams'},
              {'cfg': 'tiny.yaml', 'pretrained': 'a', 'opts': 'SEED 3'}]
    (folder / 'models.yaml').write_text(yaml.safe_dump(models))
    return folder


def read(path):
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def evaluate(data, output, *opts):
    opts = ['DATA.DATA_PATH', str(data), 'OUTPUT', str(output), 'MODEL.PRETRAINED', str(data / 'a'), *opts]
    return engine.run(get_config(None, [*TINY, 'EVAL', True, *opts]))['val']


def test_evaluation_adds_its_line(data, tmp_path):
    one = evaluate(data, tmp_path / 'run')
    two = evaluate(data, tmp_path / 'run', 'DATA.IMAGE_SIZE', 32, 'DATA.CROP_PCT', 0.5)
    lines = read(tmp_path / 'run' / 'results.csv')
    assert [tuple(line) for line in lines] == [results.COLUMNS] * 2
    for line, result, size, crop in zip(lines, (one, two), ('16', '32'), ('1.0', '0.5')):
        assert (line['model'], line['weights'], line['data']) == ('tiny', str(data / 'a'), str(data))
        assert (line['image_size'], line['crop_pct'], line['images']) == (size, crop, '11')
        assert (line['device'], line['amp']) == ('cpu', '')
        assert float(line['top1']) == pytest.approx(result['acc1'], abs=6e-4)
        assert float(line['top5']) == pytest.approx(result['acc5'], abs=6e-4)
        assert float(line['loss']) == pytest.approx(result['loss'], abs=6e-6)
        assert float(line['images_per_s']) > 0
        arrays = weights.read(str(data / 'a.pdparams'))
        count = sum(value.size for key, value in arrays.items() if not key.endswith(('._mean', '._variance')))
        assert float(line['parameters_m']) == pytest.approx(count / 1e6, abs=6e-4)


def test_multiply_adds_equal_those_of_timm():
    model = build_halonet(get_config(f'{cli.ROOT}/configs/halonet_26t_256.yaml'))
    assert results.multiply_adds(model, 256) == pytest.approx(3.19, rel=0.02)


def test_table_of_another_version_is_refused(data, tmp_path):
    (tmp_path / 'results.csv').write_text('model,top1\nx,1\n')
    with pytest.raises(ValueError, match='its columns are model, top1'):
        evaluate(data, tmp_path / 'run', 'RESULTS', str(tmp_path / 'results.csv'))
    assert (tmp_path / 'results.csv').read_text() == 'model,top1\nx,1\n'


def test_eval_all_goes_on_after_a_failure(data, tmp_path):
    lines = ['cfg,pretrained,image_size', 'tiny.yaml,none.pdparams,16', 'tiny.yaml,a.pdparams,32']
    (data / 'two.csv').write_text('\n'.join(lines))
    words = ['-data_path', data, '-results', tmp_path / 'all.csv', '-crop_pct', 0.5]
    done = program('tools/eval_all.py', data / 'two.csv', *words, check=False)
    assert done.returncode == 1 and 'Traceback' not in done.stdout + done.stderr
    lines = read(tmp_path / 'all.csv')
    shown = [(line['image_size'], line['crop_pct']) for line in lines]
    assert shown == [('32', '0.5')]
    for line in lines:
        single = evaluate(data, tmp_path / 'run', 'DATA.IMAGE_SIZE', int(line['image_size']), 'DATA.CROP_PCT',
                          float(line['crop_pct']))
        assert float(line['top1']) == pytest.approx(single['acc1'], abs=6e-4)
        assert float(line['loss']) == pytest.approx(single['loss'], abs=1e-5)
    assert '[2/2]' in done.stdout and re.search(r'FAILED: .*none\.pdparams: no such file', done.stdout)
    assert '1 of 2 failed:' in done.stdout
    markdown = [line for line in done.stdout.splitlines() if line.startswith('|')]
    assert len(markdown) == 3 and len({len(line) for line in markdown}) == 1


def test_csv_list_gives_the_same_jobs_as_yaml(data, tmp_path):
    lines = ['cfg,pretrained,image_size,crop_pct,opts', 'tiny.yaml,a.pdparams,16 32,0.5,',
             'tiny.yaml,none.pdparams,,,', 'tiny.yaml,a,,,SEED 3']
    (data / 'models.csv').write_text('\n'.join(lines))
    jobs = eval_all.jobs_of(str(data / 'models.yaml'), ['8'], ['0.9'])
    assert jobs == eval_all.jobs_of(str(data / 'models.csv'), ['8'], ['0.9'])
    assert [(job.image_size, job.crop_pct) for job in jobs[2:]] == [('8', '0.9')] * 2
    assert jobs[3].opts == ['SEED', '3']
    assert jobs[2].pretrained == 'none.pdparams' and jobs[3].pretrained == str(data / 'a')


@pytest.mark.parametrize('name, text, message', [
    ('a.yaml', 'x: [', 'not valid'),
    ('a.yaml', '', 'expected a list'),
    ('a.yaml', 'cfg: x', 'expected a list'),
    ('a.yaml', '- {cfg: x}', 'entry 1 needs cfg and pretrained'),
    ('a.csv', 'cfg,weights\na,b\n', 'entry 1 needs'),
    ('a.yaml', '- {cfg: x, pretrained: y, size: 3}', 'entry 1 has size; known are')])
def test_mistake_in_a_list_is_one_line(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        eval_all.parser().run(eval_all.main, [str(tmp_path / name), '-data_path', 'x'])
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('entry, words, message', [
    ('opts: DATA.CROP_PCT 0.9', ['-crop_pct', '0.5'], "-crop_pct says 0.5 and -opts DATA.CROP_PCT says 0.9"),
    ('image_size: [8, 16]', ['-opts', 'DATA.IMAGE_SIZE', '8'],
     '-image_size says 16 and -opts DATA.IMAGE_SIZE says 8')])
def test_contradiction_is_refused_before_the_evaluations(tmp_path, capsys, entry, words, message):
    (tmp_path / 'a.yaml').write_text(f'- {{cfg: x, pretrained: y, {entry}}}')
    with pytest.raises(SystemExit) as stop:
        eval_all.parser().run(eval_all.main, [str(tmp_path / 'a.yaml'), '-data_path', 'x', *words])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == '' and message in err.splitlines()[-1]


@pytest.mark.parametrize('name, message', [
    ('table.csv', 'its columns are model, top1'), ('folder', 'cannot be written: Is a')])
def test_unusable_table_is_refused_before_the_evaluations(tmp_path, capsys, name, message):
    (tmp_path / 'a.yaml').write_text('- {cfg: x, pretrained: y}')
    (tmp_path / 'table.csv').write_text('model,top1\nx,1\n')
    (tmp_path / 'folder').mkdir()
    with pytest.raises(SystemExit) as stop:
        words = [str(tmp_path / 'a.yaml'), '-data_path', 'x', '-results', str(tmp_path / name)]
        eval_all.parser().run(eval_all.main, words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == '' and message in err


@pytest.mark.slow
def test_two_processes_write_one_line(data, tmp_path):
    words = ['-eval', '-pretrained', data / 'a', '-output', tmp_path, '-results', tmp_path / 'r.csv']
    program('main_multi_gpu.py', '-data_path', data, *words, '-nprocs', 2, *options(TINY))
    assert [line['images'] for line in read(tmp_path / 'r.csv')] == ['11']
    assert np.isfinite(float(read(tmp_path / 'r.csv')[0]['loss']))
