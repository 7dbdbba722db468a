"""Every model of configs/ by its name, for paddle.hub:

    model = paddle.hub.load(FOLDER, 'halonet_26t', source='local', pretrained=FILE)

`pretrained` is a weight file as for -pretrained, or '' for fresh weights; `opts` are options as after -opts, such as
['MODEL.NUM_CLASSES', 0] for a backbone without classifier.

Modules of this project have common names, such as utils and config, which the caller's own may have too. They are
imported under these names and then taken out of sys.modules again, so both work, in any order. They stay there only
for a caller who can import this project itself.
"""
import contextlib  # modules as wholes: paddle.hub.list takes every function here for a model
import functools
import pathlib
import sys
import types

_ROOT = pathlib.Path(__file__).resolve().parent
_NAMES = ({path.stem for path in _ROOT.glob('*.py')} | {path.parent.name for path in _ROOT.glob('*/*.py')}) - {'hubconf'}
# paddle.hub imports this file at each call; what the first call has imported stays here: {folder: {name: module}}
_LOADED = vars(sys.modules.setdefault('_halonet_hub', types.ModuleType('_halonet_hub')))


def _is_ours(module):
    """True if a module, or a package of any kind, lies in this folder."""
    places = [getattr(module, '__file__', None) or '', *getattr(module, '__path__', ())]
    return any(_ROOT in pathlib.Path(place).resolve().parents for place in places if place)


def _modules():
    """Return the imported modules that have a name of this project, and whatever is inside of them: {name: module}."""
    return {name: module for name, module in [*sys.modules.items()] if name.split('.')[0] in _NAMES}


def _callers_own():
    """True if the caller has imported this project, or has its folder on sys.path beside the entry of paddle.hub."""
    folders = [pathlib.Path(entry).resolve() for entry in sys.path]
    return folders.count(_ROOT) > 1 or any(map(_is_ours, _modules().values()))


@contextlib.contextmanager
def _project():
    """Let `import utils` and the like mean this project inside the context, and the caller's modules after it."""
    theirs = {name: module for name, module in _modules().items() if not _is_ours(module)}
    for name in theirs:
        del sys.modules[name]
    for name, module in _LOADED.get(str(_ROOT), {}).items():
        sys.modules.setdefault(name, module)
    sys.path.insert(0, str(_ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(_ROOT))
        _LOADED[str(_ROOT)] = _modules()
        if not _SHARED:
            for name in _LOADED[str(_ROOT)]:
                del sys.modules[name]
        sys.modules.update(theirs)


_SHARED = _callers_own()
with _project():
    import config
    import halonet
    from model import weights
    if not all(map(_is_ours, (config, halonet, weights))):
        raise ImportError(f'modules of {_ROOT} are not found there: something else imports config, halonet or weights first')

dependencies = ['paddle', 'numpy', 'yaml', 'yacs']


def _load(path, pretrained='', opts=()):
    if not isinstance(pretrained, (str, pathlib.Path)):
        raise ValueError(f'pretrained is {pretrained!r}; give a weight file or a name such as timm/halonet26t.a1h_in1k')
    with _project():
        model = halonet.build_halonet(config.get_config(path, opts))
        if pretrained:
            weights.load_pretrained(model, pretrained)
    return model


def _entry(path):
    entry = functools.partial(_load, path)
    entry.__doc__ = path.read_text(encoding='utf-8').split('\nBASE')[0].replace('# ', '')    # paddle.hub.help shows it
    return entry


globals().update({config.get_config(path).MODEL.NAME: _entry(path)
                  for path in sorted((_ROOT / 'configs').glob('[!_]*.yaml'))})
