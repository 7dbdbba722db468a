"""Write files as torch.save does, without PyTorch, opcode by opcode: whole, wrong or hostile ones."""
import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np

from model import weight_formats


class Named:
    """Stands for the global MODULE.NAME, called with `args` if there are any; pickled by Writer."""

    def __init__(self, module, name, args=None):
        self.module, self.name, self.args = module, name, args


class Ref(tuple):
    """A persistent id."""


class Writer(pickle._Pickler):
    """A pickler that writes Named and Ref objects as PyTorch does."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Ref):
            super().save(tuple(obj))
            self.write(pickle.BINPERSID)
        elif isinstance(obj, Named):
            self.write(pickle.GLOBAL + f'{obj.module}\n{obj.name}\n'.encode())
            if obj.args is not None:
                super().save(obj.args)
                self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def dump(obj):
    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump(obj)
    return buffer.getvalue()


def tensor(key='0', *, count=6, offset=0, shape=(2, 3), strides=(3, 1), kind='FloatStorage', extra=()):
    storage = Ref(('storage', Named('torch', kind), key, 'cpu', count, *extra))
    return Named(
        'torch._utils', '_rebuild_tensor_v2', (storage, offset, shape, strides, False, OrderedDict())
    )


NUMBERS = np.arange(6, dtype='<f4')


def write_zip(path, content, storages=None, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', content if isinstance(content, bytes) else dump(content))
        for key, data in ({'0': NUMBERS.tobytes()} if storages is None else storages).items():
            archive.writestr(f'archive/data/{key}', data)
        for name, data in entries.items():
            archive.writestr(f'archive/{name}', data)
    return str(path)


def write_legacy(path, content, storages=None, version=1001, little=True):
    storages = {'0': NUMBERS} if storages is None else storages
    parts = [dump(weight_formats.TORCH_MAGIC), dump(version), dump({'little_endian': little}),
             content if isinstance(content, bytes) else dump(content), dump(list(storages))]
    parts += [struct.pack('<q', len(data)) + data.tobytes() for data in storages.values()]
    path.write_bytes(b''.join(parts))
    return str(path)


def legacy_tensor(**kwargs):
    return tensor(extra=(None,), **kwargs)


WRITERS = {'zip': (write_zip, tensor), 'legacy': (write_legacy, legacy_tensor)}
