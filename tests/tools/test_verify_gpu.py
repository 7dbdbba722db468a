"""tools/verify_gpu.py: what it makes of results, failures and rows that hang. A GPU is pretended."""
import json

from tools import gpu_checks, gpu_runs, verify_gpu

import numpy as np
import paddle
import pytest
from pretended_gpu import pretend_gpu

CONFIG = gpu_runs.CONFIG


def verify(folder, *words):
    """The exit code of the tool on the CPU, and the rows of its JSON by name."""
    args = verify_gpu.parser().parse_args(['-output', str(folder), '-device', 'cpu', *words])
    code = verify_gpu.main(args)
    rows = json.loads((folder / 'verify_gpu.json').read_text())['rows']
    return code, {row['row']: row for row in rows}


def states(checks):
    return {check.name: check.state for check in checks}


def test_rows_are_shown_and_written(tmp_path, capsys):
    code, rows = verify(tmp_path, '-rows', 'machine', 'forward')
    assert code == 0 and [row['state'] for row in rows.values()] == ['passed', 'open']
    assert {'name': 'paddle', 'expected': '', 'measured': paddle.__version__, 'state': 'noted'} in (
        rows['machine']['checks'])
    shown = capsys.readouterr().out
    assert 'logits of every model against those of the CPU: needs a GPU' in shown
    assert 'rows: 1 passed, 0 failed, 0 noted, 1 open' in shown
    page = (tmp_path / 'verify_gpu.html').read_text()
    assert 'forward: open' in page and paddle.__version__ in page


def test_row_that_hangs_is_ended_and_fails(tmp_path, monkeypatch):
    function, _ = gpu_checks.ROWS['memory']
    monkeypatch.setitem(gpu_checks.ROWS, 'memory', (function, 0.3))
    code, rows = verify(tmp_path, '-rows', 'memory', 'sentences')
    assert code == 1 and [row['state'] for row in rows.values()] == ['failed', 'open']
    assert rows['memory']['checks'][-1]['measured'].endswith('ended by the time limit of 0.3 s')


def test_row_that_ends_with_an_error_fails(tmp_path):
    row = verify_gpu.run_row('attention', gpu_runs.Machine('gpu', 1, str(tmp_path)))
    assert row.state == 'failed' and row.checks[-1].name == 'end'
    assert row.checks[-1].measured.startswith('exit code 2: verify_gpu.py: error: ')


def test_unknown_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match='-device gpu: Paddle sees no GPU here'):
        verify_gpu.main(verify_gpu.parser().parse_args(['-output', str(tmp_path), '-device', 'gpu']))


@pytest.mark.parametrize('value, state', [(0.5, 'passed'), (1.0, 'passed'), (1.1, 'failed'),
                                          (float('nan'), 'failed'), (float('inf'), 'failed')])
def test_numbers_beyond_the_limit_fail(value, state):
    assert gpu_runs.at_most('x', value, 1.0).state == state


def test_runs_of_unequal_length_are_apart():
    assert gpu_runs.apart([1.0], [1.0, 1.0]) == float('inf')
    assert gpu_runs.apart([1.1, 2.0], [1.0, 2.0]) == pytest.approx(0.1)


def test_sentences_about_what_is_unverified_are_found(tmp_path):
    found = [check.name for check in gpu_checks.sentences(gpu_runs.Machine('cpu', 0, str(tmp_path)))]
    assert any(name.startswith('README.md:') for name in found)
    assert any(name.startswith('docs/attention.md:') for name in found)


# ---- the rows that need a GPU, on the CPU: they find what differs

@pytest.fixture
def machine(monkeypatch, tmp_path):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(paddle, 'set_device', lambda device: None)
    monkeypatch.setattr(gpu_checks, 'published', lambda: [CONFIG])
    monkeypatch.setattr(gpu_checks, 'LARGE', CONFIG)
    monkeypatch.setattr(gpu_checks, 'WITH_LAMBDA', CONFIG)
    return gpu_runs.Machine('gpu', 1, str(tmp_path))


def test_logits_are_compared(machine, monkeypatch):
    assert states(gpu_checks.forward(machine)) == {'halonet_digits': 'passed'}
    original = gpu_checks.logits_of
    monkeypatch.setattr(gpu_checks, 'logits_of', lambda config, device:
                        original(config, device) + 0.01 * (device == 'gpu'))
    assert states(gpu_checks.forward(machine)) == {'halonet_digits': 'failed'}


def test_mixed_precision_is_compared(machine, monkeypatch):
    assert set(states(gpu_checks.mixed_precision(machine)).values()) == {'passed'}
    original = gpu_checks.logits_and_gradient

    def rough(config, dtype):
        logits, gradient = original(config, dtype)
        noise = np.random.default_rng(0).standard_normal(gradient.shape) * gradient.std()
        return logits * (1.2 if dtype else 1), gradient + noise * bool(dtype)

    monkeypatch.setattr(gpu_checks, 'logits_and_gradient', rough)
    assert set(states(gpu_checks.mixed_precision(machine)).values()) == {'failed'}


def test_missing_overflow_fails(machine):
    """Float32 does not overflow where float16 would."""
    assert states(gpu_checks.overflow(machine)) == {'skipped steps': 'failed', 'last loss': 'passed'}


@pytest.mark.slow
def test_everything_that_a_cpu_can_answer_passes(tmp_path):
    code, rows = verify(tmp_path)
    assert code == 0 and list(rows) == list(gpu_checks.ROWS)
    assert [name for name, row in rows.items() if row['state'] == 'open'] == [
        'forward', 'mixed precision', 'steps', 'overflow', 'synchronised norms', 'sentences']
