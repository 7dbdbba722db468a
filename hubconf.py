"""Every model of configs/ by its name, for paddle.hub:

    model = paddle.hub.load(FOLDER, 'halonet_26t', source='local', pretrained=FILE)

`pretrained` is a weight file as for -pretrained, or '' for fresh weights; `opts` are options as after -opts, such as
['MODEL.NUM_CLASSES', 0] for a backbone without classifier.
"""
import functools  # modules as wholes: paddle.hub.list takes every function here for a model
import pathlib
import sys

for _path in pathlib.Path(__file__).parent.glob('*.py'):
    _other = getattr(sys.modules.get(_path.stem), '__file__', None)
    if _path.stem != 'hubconf' and _other and pathlib.Path(_other).resolve() != _path.resolve():
        raise ImportError(f"the module {_path.stem} of {_other} stands in the way of this project's own: load the model from the "
                          'hub before that is imported, or in a process of its own')

import config  # noqa: E402
import halonet  # noqa: E402
import weights  # noqa: E402

dependencies = ['paddle', 'numpy', 'yaml', 'yacs']


def _load(path, pretrained='', opts=()):
    if not isinstance(pretrained, (str, pathlib.Path)):
        raise ValueError(f'pretrained is {pretrained!r}; give a weight file or a name such as timm/halonet26t.a1h_in1k')
    model = halonet.build_halonet(config.get_config(path, opts))
    if pretrained:
        weights.load_pretrained(model, pretrained)
    return model


def _entry(path):
    entry = functools.partial(_load, path)
    entry.__doc__ = path.read_text(encoding='utf-8').split('\nBASE')[0].replace('# ', '')    # paddle.hub.help shows it
    return entry


globals().update({config.get_config(path).MODEL.NAME: _entry(path)
                  for path in sorted((pathlib.Path(__file__).parent / 'configs').glob('[!_]*.yaml'))})
