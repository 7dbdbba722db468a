"""system/cpu.py, and which threads are used after Paddle's import."""
from system import cpu
import utils

import paddle
import pytest
from runs import program

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 7763
flags\t\t: fpu avx2 fma

processor\t: 1
model name\t: another
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd
CPU part\t: 0xd0c

"""


@pytest.fixture
def cpuinfo(monkeypatch):
    """A function that sets the text of /proc/cpuinfo, or the error of reading it."""
    def set_text(text):
        def read(path, **options):
            assert str(path) == '/proc/cpuinfo'
            if isinstance(text, OSError):
                raise text
            return text
        cpu.facts.cache_clear()
        monkeypatch.setattr(cpu.Path, 'read_text', read)
    yield set_text
    monkeypatch.undo()
    cpu.facts.cache_clear()


def test_facts_are_those_of_the_first_processor(cpuinfo):
    cpuinfo(X86)
    assert cpu.facts() == {'processor': '0', 'vendor_id': 'AuthenticAMD', 'model name': 'AMD EPYC 7763',
                           'flags': 'fpu avx2 fma'}
    assert cpu.model_name() == 'AMD EPYC 7763' and cpu.is_amd()
    assert cpu.instructions() == {'fpu', 'avx2', 'fma'}


def test_processor_without_a_name(cpuinfo, monkeypatch):
    monkeypatch.setattr(cpu.platform, 'machine', lambda: 'aarch64')
    cpuinfo(ARM)
    assert cpu.model_name() == 'aarch64' and not cpu.is_amd() and cpu.instructions() == {'fp', 'asimd'}


def test_system_without_cpuinfo(cpuinfo, monkeypatch):
    monkeypatch.setattr(cpu.platform, 'machine', lambda: 'sparc')
    cpuinfo(FileNotFoundError(2, 'No such file or directory'))
    assert cpu.facts() == {} and cpu.model_name() == 'sparc'
    assert not cpu.is_amd() and cpu.instructions() == set()


@pytest.mark.parametrize('imports, given, found', [('utils', None, None), ('paddle, utils', None, None),
                                                   ('paddle, utils', '3', '3')])
def test_threads_of_the_user_survive_the_import_of_paddle(monkeypatch, imports, given, found):
    """Paddle's import sets OMP_NUM_THREADS to 1 where it is missing, whatever was imported first."""
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    code = (f'import os, {imports}; from system import cpu\n'
            'print(cpu.user_threads(), os.environ.get("OMP_NUM_THREADS"))')
    done = program('-c', code, **({'OMP_NUM_THREADS': given} if given else {}))
    assert done.stdout.split() == [str(found), str(found)]


@pytest.mark.parametrize('environment, exhaustive', [
    ({}, True), ({'FLAGS_cudnn_deterministic': '1'}, None), ({'FLAGS_cudnn_deterministic': 'False'}, True),
    ({'FLAGS_cudnn_exhaustive_search': '0'}, None)])
def test_flags_of_a_gpu(monkeypatch, environment, exhaustive):
    """Those of the user stay, and the search for the fastest algorithm ends where the bits shall repeat."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    flags = {}
    monkeypatch.setattr(paddle, 'set_flags', flags.update)
    utils.tune_gpu()
    assert flags.get('FLAGS_cudnn_exhaustive_search') is exhaustive
    assert flags['FLAGS_cudnn_batchnorm_spatial_persistent'] is True
