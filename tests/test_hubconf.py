"""paddle.hub.load of this project beside modules and packages of the caller that have the same names."""
import os
import subprocess
import sys

import pytest
from runs import ROOT

PROGRAM = """
import copy, sys
import paddle

def theirs():
    import utils, config, data.folder, model.layers
    assert utils.__path__ and utils.__file__ is None
    assert (config.MINE, data.folder.MINE, model.layers.MINE) == (1, 2, 3)
    import utils.tool
    assert utils.tool.MINE == 4
    return utils, config, data.folder, model.layers, utils.tool

before = theirs() if BEFORE else None
path = list(sys.path)
assert 'halonet_26t' in paddle.hub.list(ROOT, source='local')
text = paddle.hub.help(ROOT, 'halonet_digits', source='local')
assert 'handwritten digits' in text and 'STEM' not in text and '#' not in text
model = paddle.hub.load(ROOT, 'halonet_digits', source='local')
paddle.save(model.state_dict(), 'model.pdparams')
loaded = paddle.hub.load(ROOT, 'halonet_digits', source='local', pretrained='model.pdparams')
assert type(loaded) is type(model), 'the second call has imported everything again'
assert sys.path == path
after = theirs()
assert before is None or all(one is other for one, other in zip(before, after))
assert 'halonet' not in sys.modules and 'model.weights' not in sys.modules

model.eval(), loaded.eval()
images = paddle.randn([2, 3, 32, 32])
expected = model(images).numpy()
assert (loaded(images).numpy() == expected).all()
assert (copy.deepcopy(model)(images).numpy() == expected).all()
model.train()
model(images).sum().backward()
model.eval()
spec = [paddle.static.InputSpec([None, 3, 32, 32])]
paddle.jit.save(paddle.jit.to_static(loaded, input_spec=spec, full_graph=True), 'saved')
assert abs(paddle.jit.load('saved')(images).numpy() - expected).max() < 1e-4 * abs(expected).max()
"""


def run(folder, text, **environment):
    done = subprocess.run([sys.executable, '-c', text], cwd=folder, capture_output=True, text=True,
                          timeout=600, env={**os.environ, 'PYTHONPATH': '', **environment})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('before', [True, False], ids=['imported before', 'imported after'])
def test_modules_of_the_caller_with_the_same_names(tmp_path, before):
    """Namespace package, package, plain module: each name means the caller's before and after a load."""
    for name, text in (('utils/tool.py', 'MINE = 4'), ('config.py', 'MINE = 1'), ('data/__init__.py', ''),
                       ('data/folder.py', 'MINE = 2'), ('model/layers.py', 'MINE = 3')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    run(tmp_path, f'ROOT, BEFORE = {ROOT!r}, {before}\n{PROGRAM}')


@pytest.mark.parametrize('first', ['', 'import halonet, model.layers\n'])
def test_caller_in_this_folder_gets_the_same_modules(tmp_path, first):
    run(ROOT, f"{first}import paddle\nmodel = paddle.hub.load('.', 'halonet_digits', source='local')\n"
              'import halonet\nassert type(model) is halonet.HaloNet')
