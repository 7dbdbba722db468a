"""The same images in archives: a tar or a zip with the lists in it, shards, a tar of tars."""
import os
import tarfile
import zipfile
from pathlib import Path

LISTS = ('train_list.txt', 'val_list.txt')


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob('*') if path.is_file())


def pack_tar(folder, path, names=None, prefix=''):
    with tarfile.open(path, 'w') as archive:
        for name in names or files_of(folder):
            archive.add(os.path.join(folder, name), prefix + name)


def pack_zip(folder, path, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name in files_of(folder):
            archive.write(os.path.join(folder, name), name)


def as_tar(images, folder):
    pack_tar(images, folder / 'data.tar', prefix='./')
    return folder / 'data.tar'


def as_zip(images, folder):
    pack_zip(images, folder / 'data.zip')
    return folder / 'data.zip'


def as_shards(images, folder):
    """A folder with the lists and a tar for each half of the images, as lines 'SHARD.tar/NAME LABEL'."""
    shards = {name: [] for name in ('even.tar', 'odd.tar')}
    for name in LISTS:
        lines = []
        for i, line in enumerate((Path(images) / name).read_text().splitlines()):
            shard = list(shards)[i % 2]
            shards[shard].append(line.split()[0])
            lines.append(f'{shard}/{line}\n')
        (folder / name).write_text(''.join(lines))
    for shard, names in shards.items():
        pack_tar(images, folder / shard, names)
    return folder


def as_tar_of_tars(images, folder):
    """A folder with the lists and one tar, which holds a tar of each split."""
    for split, name in zip(('train', 'val'), LISTS):
        pack_tar(Path(images) / split, folder / f'{split}.tar')
        text = (Path(images) / name).read_text()
        (folder / name).write_text(text.replace(f'{split}/', f'all.tar/{split}.tar/'))
    pack_tar(folder, folder / 'all.tar', ['train.tar', 'val.tar'])
    for split in ('train', 'val'):
        (folder / f'{split}.tar').unlink()
    return folder


def as_parquet(images, folder):
    """A folder with the lists and a parquet file for each split, as a hub has them; 3 images a row group."""
    from pyarrow import Table, parquet
    for split, name in zip(('train', 'val'), LISTS):
        rows = [line.split() for line in (Path(images) / name).read_text().splitlines()]
        image = [{'bytes': (Path(images) / path).read_bytes(), 'path': path} for path, _ in rows]
        table = Table.from_pydict({'image': image, 'label': [int(label) for _, label in rows]})
        parquet.write_table(table, folder / f'{split}-00000-of-00001.parquet', row_group_size=3)
        lines = [f'{split}-00000-of-00001.parquet/{i} {label}\n' for i, (_, label) in enumerate(rows)]
        (folder / name).write_text(''.join(lines))
    return folder


FORMS = {'tar': as_tar, 'zip': as_zip, 'shards': as_shards, 'tar of tars': as_tar_of_tars,
         'parquet': as_parquet}
