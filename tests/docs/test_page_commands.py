"""Run the commands and programs of the README and the docs, as they are, in a copy of the repository.

Small stand-ins replace the user's files: pictures of a few pixels, initial weights. Trainings get the
options SHORTER.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

from tools import port_weights

import numpy as np
import paddle
import pytest
from pages import PAGES, commands, text_of
from PIL import Image
from runs import ROOT

from config import get_config
from halonet import build_halonet

pytestmark = pytest.mark.slow
ELSEWHERE = {                               # pages whose commands other tests run
    'docs/attention.md': 'a measurement of minutes',
    'docs/performance.md': 'measurements of an hour',
    'docs/performance_history.md': 'measurements of an hour',
    'docs/deployment.md': 'tests/tools/test_export.py',
    'docs/quantization.md': 'tests/tools/test_precision.py',
    'docs/gpu.md': 'tests/tools/test_verify_gpu.py and tests/dev/test_benchmark.py',
    'docs/reliability.md': 'several machines: tests/system/test_restarts.py'}
RUN = {                                             # commands of each page that run here
    'README.md': 8, 'CONTRIBUTING.md': 1, 'docs/backbone.md': 2, 'docs/data.md': 6, 'docs/evaluation.md': 6,
    'docs/finetune.md': 5, 'docs/imagenet.md': 5, 'docs/models.md': 1, 'docs/paddlevit.md': 1,
    'docs/paper.md': 1, 'docs/predict.md': 4,
    'docs/report.md': 5,
    'docs/training.md': 2, 'docs/weights.md': 3}
INSTALLS = r'python3 -m venv|\S*python -m pip'
SHORTER = [
    '-opts', 'DATA.IMAGE_SIZE', '32', 'DATA.NUM_WORKERS', '0', 'TRAIN.NUM_EPOCHS', '1',
    'TRAIN.WARMUP_EPOCHS', '0.0']
STAND_INS = {'/data/imagenet': 'imagenet', '...': 'imagenet', 'RUN': 'demo/run'}
GIVEN = {                                           # variables that a program of a page takes for given
    'docs/predict.md': 'import paddle; from config import get_config; from halonet import build_halonet\n'
                       'model = build_halonet(get_config("demo/run/config.yaml")); model.eval()\n'
                       'images = paddle.zeros([1, 3, 32, 32])\n'}
CLASSES = ['n01440764', 'n01443537', 'n01484850']
TRUTH = [3, 1, 2, 2]                        # ids of the flat val/; they are not the labels
IDS = {1: CLASSES[2], 2: CLASSES[0], 3: CLASSES[1]}


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype='uint8')
    Image.fromarray(pixels).save(path, 'JPEG')


def flowers(folder):
    for i, name in enumerate(('daisy', 'dandelion', 'rose', 'sunflower', 'tulip')):
        for j in range(9):
            picture(folder / name / f'{j}.jpg', 9 * i + j)


def birds(folder):
    """Write birds/ with ten pictures, and a table of their species and splits."""
    rows = ['image_id,species,split']
    for i in range(10):
        picture(folder / 'birds' / f'{i}.jpg', 200 + i)
        rows.append(f'{i},{("wren", "owl")[i % 2]},{"val" if i > 7 else "train"}')
    (folder / 'birds.csv').write_text('\n'.join(rows))


def scans(folder):
    """Write scans/ with pictures of two classes and their lists."""
    for split in ('train', 'val'):
        lines = []
        for i in range(34):
            picture(folder / 'scans' / split / f'{i}.jpg', 300 + i)
            lines.append(f'{split}/{i}.jpg {i % 2}\n')
        (folder / 'scans' / f'{split}_list.txt').write_text(''.join(lines))


def imagenet(folder):
    """Write train/ and val/ with a folder per class, images of a flat val/, and their labels."""
    from scipy.io import savemat
    for i, name in enumerate(CLASSES):
        for j in range(22):
            picture(folder / 'imagenet' / 'train' / name / f'{name}_{j}.JPEG', 22 * i + j)
        picture(folder / 'imagenet' / 'val' / name / f'{i}.JPEG', i)
    flat = [f'ILSVRC2012_val_{i:08}' for i in range(1, 5)]
    for i, name in enumerate(flat):
        picture(folder / 'imagenet' / 'val' / f'{name}.JPEG', 100 + i)
    lines = [f'{name},{IDS[number]} 1 2 3 4\n' for name, number in zip(flat, TRUTH)]
    (folder / 'LOC_val_solution.csv').write_text('ImageId,PredictionString\n' + ''.join(lines))
    (folder / 'ILSVRC2012_validation_ground_truth.txt').write_text(''.join(f'{number}\n' for number in TRUTH))
    rows = np.array([(number, name, 0) for number, name in IDS.items()],
                    [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('num_children', 'O')])
    savemat(folder / 'meta.mat', {'synsets': rows.reshape(-1, 1)})
    for part in ('train', 'val'):
        lists = [f'{part}/{name}/{path} {i}\n' for i, name in enumerate(CLASSES)
                 for path in sorted(os.listdir(folder / 'imagenet' / part / name))]
        (folder / 'imagenet' / f'{part}_list.txt').write_text(''.join(lists))


def protocols(folder):
    """Write imagenet-a/ with two classes and a list of all, and several right labels of imagenet/val."""
    for i, name in enumerate(CLASSES[:2]):
        for j in range(3):
            picture(folder / 'imagenet-a' / name / f'{j}.jpg', 400 + 3 * i + j)
    lines = [f'{name}/{j}.jpg {i}\n' for i, name in enumerate(CLASSES[:2]) for j in range(3)]
    (folder / 'imagenet-a' / 'all_list.txt').write_text(''.join(lines))
    names = [f'{i}.JPEG' for i in range(3)] + [f'ILSVRC2012_val_{i:08}.JPEG' for i in range(1, 5)]
    (folder / 'real.json').write_text(json.dumps({name: [i, 7][:i] for i, name in enumerate(names)}))


def fresh_weights(folder):
    for name in ('halonet_26t_256', 'halonet_50ts_256'):
        model = build_halonet(get_config(f'{ROOT}/configs/{name}.yaml'))
        paddle.save(model.state_dict(), str(folder / f'{name}.pdparams'))
    (folder / 'timm').mkdir()
    port_weights.port(str(folder / 'halonet_26t_256.pdparams'), str(folder / 'timm' / 'x.safetensors'))
    # loading prefers a file to the hub
    os.rename(folder / 'timm' / 'x.safetensors', folder / 'timm' / 'halonet26t.a1h_in1k')


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """Make a clone called HaloNet, with an environment, the demo's run and the files that pages assume."""
    folder = tmp_path_factory.mktemp('user') / 'HaloNet'
    left_out = shutil.ignore_patterns('.*', 'demo', 'output', 'runs', '__pycache__')
    shutil.copytree(ROOT, folder, ignore=left_out)
    (folder / '.venv' / 'bin').mkdir(parents=True)
    scripts = {'.venv/bin/python': f'exec {shlex.quote(sys.executable)} "$@"', 'tools/setup_env.sh': 'exit 0'}
    for name, text in scripts.items():
        (folder / name).write_text(f'#!/bin/sh\n{text}\n')
        (folder / name).chmod(0o755)
    flowers(folder / 'flowers')
    birds(folder)
    scans(folder)
    imagenet(folder)
    protocols(folder)
    fresh_weights(folder)
    picture(folder / 'dog.jpg', 1)
    picture(folder / 'holidays' / 'beach.jpg', 2)
    (folder / 'names.txt').write_text(''.join(f'digit {i}\n' for i in range(10)))
    (folder / 'swanlab.py').write_text('def init(**_): pass\ndef log(*_, **__): pass\ndef finish(): pass\n')
    (folder / 'models.yaml').write_text(yaml_of('docs/evaluation.md'))
    (folder / 'flowers.yaml').write_text(yaml_of('docs/finetune.md'))
    (folder.parent / 'my_run.yaml').write_text(yaml_of('docs/training.md'))
    shell(folder, ['./run_demo.sh', *SHORTER])
    return folder


def yaml_of(page):
    return re.search(r'```yaml\n(.*?)```', text_of(page), re.S)[1]


def shell(folder, words, **environment):
    """Run a command in the folder, as a shell in its environment would; it must succeed."""
    environment = {**os.environ, 'PATH': f'{folder}/.venv/bin:{os.environ["PATH"]}', **environment}
    hang = 600                                      # seconds; a benchmark on a busy machine takes minutes
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=hang)
    output = done.stdout + done.stderr
    assert done.returncode == 0 and 'Traceback' not in output, (words, output)
    return done


def prepared(folder, words):
    """Return a command of a page with the stand-ins for the user's files; prepare the files that it needs."""
    words = [word for word in words if word != '...']
    for theirs, ours in STAND_INS.items():
        words = [re.sub(rf'(^|=){re.escape(theirs)}$', rf'\1{ours}', word) for word in words]
    line = ' '.join(words)
    if ('main_' in line or 'run_train' in line) and '-eval' not in words:
        words += SHORTER
        if '-batch_size' not in line:
            words += ['DATA.BATCH_SIZE', '16']
    if 'tools/make_lists.py' in words:              # existing lists that differ would be kept
        data = folder / words[words.index('tools/make_lists.py') + 1]
        for part in ('train', 'val'):
            (data / f'{part}_list.txt').unlink(missing_ok=True)
    wanted = [word for word in words if word.startswith('runs/') and 'checkpoints' in word]
    for path in wanted:                             # the shorter training has fewer steps
        newest = sorted(os.listdir((folder / path).parent))[-1]
        os.replace((folder / path).parent / newest, folder / path)
    return words


@pytest.mark.parametrize('page', [page for page in PAGES if page not in ELSEWHERE])
def test_commands_of_a_page_run(clone, page):
    ran = 0
    for words in commands(page):
        if page == 'docs/finetune.md' and 'tools/make_digits.py' in words:
            break                                   # test_fine_tuning_page runs the rest, without stand-ins
        if words[0] in ('./run_demo.sh', './run_tests.sh', 'NNODES=2') or re.match(INSTALLS, ' '.join(words)):
            continue                                # they make the clone, run this test, or need two machines
        if {'dev/hub_folders.py', 'dev/compare_timm/compare.py'} & {*words}:
            continue                                # they need timm, which is not here
        if 'dev/ablations.py' in words:
            continue                                # a sweep of many minutes
        if 'tools/prepare_imagenet.py' in words:
            continue                                # tests/tools/test_prepare_imagenet.py has its downloads
        words = prepared(clone, words)
        variables = [word for word in words if re.fullmatch(r'[A-Z_]+=.*', word)]
        given = dict(word.split('=', 1) for word in variables)
        shell(clone, words[len(variables):], **{'DATA': 'imagenet', **given})
        ran += 1
        for option in ('-html', '-json', '-csv', '-output', '-results'):
            for word in words[words.index(option) + 1:][:1] if option in words else []:
                assert (clone / word).exists(), word
    assert ran == RUN.get(page, 0)


@pytest.mark.parametrize('page', [page for page in PAGES if '```python' in text_of(page)])
def test_programs_of_a_page_run(clone, page):
    for program in re.findall(r'```python\n(.*?)```', text_of(page), re.S):
        shell(clone, ['python', '-c', GIVEN.get(page, '') + program.replace("'RUN/", "'demo/run/")])
