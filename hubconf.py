"""Every model of configs/ by its name, for paddle.hub:

    model = paddle.hub.load(FOLDER, 'halonet_26t', source='local', pretrained=FILE)

`pretrained` is a weight file as for -pretrained, or '' for fresh weights. `opts` are options as after -opts.
As in timm, `num_classes` gives the weights another classifier, or for 0 none, and `features_only` makes a
model that returns feature maps, of the stem and of each stage, or only those of `out_indices`.

Modules of this project have common names, such as utils and config. Those of the caller may have them
too. So ours are imported under these names and then taken out of sys.modules again: both work, in any
order. They stay there only for a caller who can import this project directly.
"""
from __future__ import annotations

import contextlib  # modules, not names of them: paddle.hub.list takes every function here for a model
import functools
import pathlib
import sys
import types
import typing

_ROOT = pathlib.Path(__file__).resolve().parent
_FILES = [*_ROOT.glob('*.py'), *_ROOT.glob('*/*.py')]
_NAMES = {path.relative_to(_ROOT).parts[0].removesuffix('.py') for path in _FILES} - {'hubconf'}
# paddle.hub imports this file at each call. The first call's imports are kept: {folder: {name: module}}
_LOADED = vars(sys.modules.setdefault('_halonet_hub', types.ModuleType('_halonet_hub')))


def _is_ours(module: types.ModuleType) -> bool:
    """True if a module, or a package of any kind, lies in this folder."""
    paths = [getattr(module, '__file__', None), *getattr(module, '__path__', ())]
    return any(_ROOT in pathlib.Path(path).resolve().parents for path in paths if path)


def _modules() -> dict[str, types.ModuleType]:
    """Return the imported modules that have a name of this project, with their submodules: {name: module}."""
    imported = [*sys.modules.items()]
    return {name: module for name, module in imported if name.partition('.')[0] in _NAMES}


def _can_import_us() -> bool:
    """True if the caller imported this project, or has its folder on sys.path as paddle.hub has."""
    entries = [pathlib.Path(entry).resolve() for entry in sys.path]
    return entries.count(_ROOT) > 1 or any(_is_ours(module) for module in _modules().values())


@contextlib.contextmanager
def _project() -> typing.Iterator[None]:
    """Import modules of this project inside the context; after it their names mean the caller's modules."""
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
        ours = _modules()
        _LOADED[str(_ROOT)] = ours
        if not _STAY_IMPORTED:
            for name in ours:
                del sys.modules[name]
        sys.modules.update(theirs)


_STAY_IMPORTED = _can_import_us()
with _project():
    import config
    import halonet
    from model import weights
    for _module in (config, halonet, weights):
        if not _is_ours(_module):
            raise ImportError(f'{_module} is imported instead of the module in {_ROOT}')

dependencies = ['paddle', 'numpy', 'yaml', 'yacs']


def _load(path: pathlib.Path, pretrained: str | pathlib.Path = '', opts: typing.Sequence[typing.Any] = (), *,
          num_classes: int | None = None, features_only: bool = False,
          out_indices: typing.Sequence[int] | None = None) -> halonet.HaloNet | halonet.FeatureMaps:
    """Build the model of a config file. Raises ValueError and OSError, as load_pretrained does."""
    if not isinstance(pretrained, (str, pathlib.Path)):
        raise ValueError(f'pretrained is {pretrained!r}; give a weight file '
                         'or a name such as timm/halonet26t.a1h_in1k')
    with _project():
        classes = [] if num_classes is None else ['MODEL.NUM_CLASSES', num_classes]
        model = halonet.build_halonet(config.get_config(path, [*opts, *classes]))
        if pretrained:
            weights.load_pretrained(model, str(pretrained), fine_tune=num_classes is not None)
        return halonet.FeatureMaps(model, out_indices) if features_only else model


def _entry(path: pathlib.Path) -> typing.Callable[..., halonet.HaloNet]:
    """Return the function that paddle.hub calls; paddle.hub.help shows the header of the config file."""
    entry = functools.partial(_load, path)
    header = []
    for line in path.read_text(encoding='utf-8').splitlines():
        if not line.startswith('#'):
            break
        header.append(line.removeprefix('# '))
    entry.__doc__ = '\n'.join(header)
    return entry


for _path in sorted((_ROOT / 'configs').glob('[!_]*.yaml')):
    globals()[config.get_config(_path).MODEL.NAME] = _entry(_path)
