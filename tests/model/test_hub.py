"""Models of the Hugging Face hub: names, the cache, failures. A local server takes the role of the hub."""
import json
import os
import subprocess
import sys
import time

import pytest
from hub_server import COMMIT, Hub, environment
from runs import ROOT, TINY

from config import get_config
from halonet import build_halonet
from model import hub, weights

FETCH = '''
import json, sys
from model import hub
for name in json.loads(sys.argv[1]):
    try:
        print(json.dumps([name, hub.fetch(name)]))
    except ValueError as error:
        print(json.dumps([name, f'error: {error}']))
'''


def fetch(names, home, url, **variables):
    """Return {name: path or message} by a new process: huggingface_hub reads its environment once."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', FETCH, json.dumps(names)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        env={**os.environ, **environment(home, url), **variables},
    )
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


MODELS = {
    'timm/both': {'model.safetensors': b'safe', 'pytorch_model.bin': b'pickle'},
    'timm/old': {'pytorch_model.bin': b'pickle'},
    'timm/none': {'README.md': b'words'},
    'timm/gated': None,
}


def test_hub_names_are_fetched_and_cached_and_failures_explained(tmp_path):
    names = [
        'timm/both',
        'hf-hub:timm/both',
        'timm/both@main',
        f'hf_hub:timm/both@{COMMIT}',
        'timm/old',
        'timm/none',
        'timm/gated',
        'timm/unknown',
        'timm/both@v9',
        'hf-hub:a/b/c',
    ]
    with Hub(MODELS) as server:
        found = fetch(names, tmp_path, server.url)
        for name in names[:4]:
            assert (
                found[name].endswith(f'/{COMMIT}/model.safetensors')
                and open(found[name], 'rb').read() == b'safe'
            )
        assert (
            found['timm/old'].endswith('pytorch_model.bin')
            and open(found['timm/old'], 'rb').read() == b'pickle'
        )
        assert all(path.startswith(str(tmp_path)) for path in (found['timm/both'], found['timm/old']))
        for name, reason in (('timm/none', 'has neither model.safetensors nor pytorch_model.bin'),
                             ('timm/gated', 'wants the terms'), ('timm/unknown', 'no such public model'),
                             ('timm/both@v9', 'no such revision'), ('hf-hub:a/b/c', 'OWNER/MODEL')):
            assert (
                found[name].startswith(f'error: {name}: no such file, and the hub ({server.url}) ')
                and reason in found[name]
            )
        downloads = {
            path: count
            for (method, path), count in server.asked.items()
            if method == 'GET' and '/resolve/' in path
        }
        assert downloads == {
            '/timm/both/resolve/main/model.safetensors': 1,
            '/timm/old/resolve/main/pytorch_model.bin': 1,
        }
        server.asked.clear()
        offline = fetch(['timm/both', 'timm/old', 'timm/unknown'], tmp_path, server.url, HF_HUB_OFFLINE='1')
        assert not server.asked
    assert [offline[name] for name in ('timm/both', 'timm/old')] == [found['timm/both'], found['timm/old']]
    assert 'may not be asked (HF_HUB_OFFLINE), and the cache has no weights of it' in offline['timm/unknown']
    gone = fetch(['timm/both', 'timm/old', 'timm/unknown'], tmp_path, server.url)  # nothing listens there now
    assert [gone[name] for name in ('timm/both', 'timm/old')] == [found['timm/both'], found['timm/old']]
    assert 'cannot be reached' in gone['timm/unknown'] and 'the cache has no weights' in gone['timm/unknown']


def test_silent_hub_is_reported_after_a_timeout():
    """huggingface_hub alone would try for minutes."""
    with Hub({}, silent=True) as server:
        start = time.monotonic()
        assert 'cannot be reached (timed out' in hub._unreachable(server.url, seconds=0.2)
        assert time.monotonic() - start < 30
    assert 'unknown url type' in hub._unreachable('huggingface.co')
    with Hub({}) as server:
        assert hub._unreachable(server.url) == ''  # it answers, if only by 401


@pytest.mark.parametrize(
    'path, is_hub',
    [
        ('timm/halonet26t.a1h_in1k', True),
        ('hf-hub:timm/halonet26t', True),
        ('hf_hub:x', True),
        ('someone/model@v1.0', True),
        ('final', False),
        ('runs/final.pdparams', False),
        ('runs/model.pth', False),
        ('runs/a/final', False),
        ('./final', False),
        ('/final', False),
        ('../final', False),
        ('tests/final', False),
        ('~/final', False),
        ('runs/', False),
        ('timm/a.pth.tar', False),
    ],
)
def test_name_without_a_file_is_a_hub_name_or_an_error(path, is_hub, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(hub, 'fetch', lambda name: f'fetched {name}')
    if is_hub:
        assert hub.find(path) == f'fetched {path}'
    else:
        with pytest.raises(FileNotFoundError, match='no such file'):
            hub.find(path)


def test_file_is_preferred_to_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, 'fetch', None)
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / 'halonet.pdparams').write_bytes(b'')
    assert hub.find('timm/halonet') == 'timm/halonet.pdparams'


def test_missing_huggingface_hub_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match='-pretrained timm/x: no such file; .* pip install huggingface_hub'):
        weights.load_pretrained(build_halonet(get_config(None, TINY)), 'timm/x')
