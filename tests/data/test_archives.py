"""data/archives.py: members of tar and zip archives are the same images as loose files."""
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from archived import FORMS, as_parquet, as_shards, as_tar, as_zip, pack_tar, pack_zip
from runs import ROOT, TINY, options, program

import config
import datasets
from data import archives, image_files


def evaluation(data):
    return datasets.build_eval(config.get_config(None, [*TINY, 'DATA.DATA_PATH', str(data)]))


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_a_zip_are_those_of_zipfile(images, tmp_path, method):
    pack_zip(images, tmp_path / 'a.zip', method)
    with zipfile.ZipFile(tmp_path / 'a.zip') as archive:
        for name in archive.namelist():
            assert archives.open_member(f'{tmp_path}/a.zip/{name}').read() == archive.read(name)


def test_members_of_a_tar_are_those_of_tarfile(images, tmp_path):
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f'{tar_format}.tar'
        with tarfile.open(path, 'w', format=tar_format) as archive:
            archive.add(images, 'a' * 90)
            archive.add(os.path.join(images, 'train', '0.png'), 'ä ü/雪.png')
        with tarfile.open(path) as archive:
            for entry in archive:
                if entry.isreg():
                    expected = archive.extractfile(entry).read()
                    assert archives.open_member(f'{path}/{entry.name}').read() == expected


def test_last_member_of_a_name_counts(images, tmp_path):
    path = tmp_path / 'a.tar'
    with tarfile.open(path, 'w') as archive:
        for i in range(3):
            archive.add(os.path.join(images, 'train', f'{i}.png'), 'same.png')
    assert archives.open_member(f'{path}/same.png').read() == Path(images, 'train', '2.png').read_bytes()


def test_index_is_made_once_and_again_after_a_change(images, tmp_path, caplog):
    caplog.set_level('INFO', 'halonet')
    path = as_tar(images, tmp_path)
    for _ in range(2):
        archives._index.cache_clear()
        archives.open_member(f'{path}/train/0.png')
    assert caplog.text.count('its index is made') == 1
    pack_tar(images, path, ['train/1.png'])
    assert archives.open_member(f'{path}/train/1.png').read() == Path(images, 'train/1.png').read_bytes()
    with pytest.raises(FileNotFoundError, match='no such member'):
        archives.open_member(f'{path}/train/0.png')
    assert len(list(tmp_path.glob('.data.tar.*.index.npy'))) == 1


def test_index_of_a_folder_that_is_read_only_is_in_the_cache(images, tmp_path, monkeypatch):
    def refuse(path, write):
        if str(path).startswith(str(tmp_path / 'data')):
            raise PermissionError(13, 'Permission denied', path)
        original(path, write)

    original = archives.files.atomic_write
    monkeypatch.setattr(archives.files, 'atomic_write', refuse)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'data').mkdir()
    archives.open_member(f'{as_tar(images, tmp_path / "data")}/train/0.png')
    assert len(list((tmp_path / 'cache').rglob('*.index.npy'))) == 1


def test_folder_may_be_called_like_an_archive(images, tmp_path):
    shutil.copytree(images, tmp_path / 'data.tar')
    loader = evaluation(tmp_path / 'data.tar')
    assert sum(len(labels) for _, labels, _ in loader.epoch(0)) == 11


def test_tools_read_members(images, tmp_path):
    data = as_zip(images, tmp_path)
    done = subprocess.run([sys.executable, 'tools/check_data.py', str(data)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and 'train: 20 images in 4 classes; 20 PNG' in done.stdout, done.stderr
    image = image_files.read(f'{data}/train/3.png')
    assert np.array_equal(image, image_files.read(f'{images}/train/3.png'))


def test_rows_of_a_parquet_file(images, tmp_path):
    path = as_parquet(images, tmp_path) / 'val-00000-of-00001.parquet'
    for row in range(11):
        data = archives.open_member(f'{path}/{row}').read()
        assert data == Path(images, 'val', f'{row}.png').read_bytes()
    assert archives.read_labels(str(path)).tolist() == [row % 4 for row in range(11)]
    for name in ('11', '-1', 'a'):
        with pytest.raises(FileNotFoundError, match='has rows 0 to 10'):
            archives.open_member(f'{path}/{name}')
    content = bytearray(path.read_bytes())
    content[100:2000] = bytes(1900)
    path.write_bytes(content)
    with pytest.raises(OSError, match='row group 0 of the parquet file is damaged'):
        archives.open_member(f'{path}/0')
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match='no parquet file, or a damaged one'):
        archives.open_member(f'{path}/0')


def test_parquet_without_pyarrow_or_images_is_explained(images, tmp_path, monkeypatch):
    from pyarrow import Table, parquet
    path = tmp_path / 'a.parquet'
    parquet.write_table(Table.from_pydict({'picture': [b'a'], 'label': [0]}), path)
    with pytest.raises(ValueError, match='the images must be in a column image; it has picture, label'):
        archives.open_member(f'{path}/0')
    archives._parquet.cache_clear()
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ValueError, match='needs pyarrow'):
        archives.open_member(f'{path}/0')


# ---- what is damaged

def cut(path, share):
    os.truncate(path, int(share * os.path.getsize(path)))


def compress(path):
    subprocess.run(['gzip', path], check=True)
    os.rename(f'{path}.gz', path)


HOPELESS = {
    'a cut tar': ('tar', lambda path: cut(path, 0.5), r'damaged one \(unexpected end of data\)'),
    'a cut zip': ('zip', lambda path: cut(path, 0.5), 'damaged one'),
    'a compressed tar': ('tar', compress, 'make it a plain tar by gunzip'),
    'a text': ('tar', lambda path: path.write_text('hello'), 'no tar or zip archive'),
}


@pytest.mark.parametrize('case', HOPELESS)
def test_archive_that_cannot_be_used_ends_the_start_in_one_line(images, tmp_path, case):
    form, damage, message = HOPELESS[case]
    data = FORMS[form](images, tmp_path)
    damage(data)
    done = program('main_single_gpu.py', '-data_path', data, '-output', tmp_path / 'run', *options(TINY),
                   check=False)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert re.search(message, done.stdout + done.stderr) and str(data) in done.stdout + done.stderr
    with pytest.raises(ValueError, match=message):
        list(archives.members(str(data)))


def test_damaged_member_is_named_with_its_place(images, tmp_path):
    path = as_zip(images, tmp_path)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo('val/5.png').header_offset
    content = bytearray(path.read_bytes())
    content[offset + 30 + len('val/5.png') + 40] ^= 255
    path.write_bytes(content)
    with pytest.raises(datasets.DataError,
                       match=f'val_list.txt:6 .*val/5.png: damaged in the archive, at byte {offset}'):
        list(evaluation(path).epoch(0))


def test_archive_that_is_cut_after_its_index_was_made_is_named_with_the_place(images, tmp_path):
    path = as_tar(images, tmp_path)
    with open(path, 'rb') as file:
        offset, size = next(member[1:3] for member in archives.members(str(path)) if member[0] == 'val/9.png')
        os.truncate(path, offset + size - 1)
        with pytest.raises(OSError, match=f'takes bytes {offset} to {offset + size}; fetch'):
            archives._read_at(file, 'val/9.png', offset, size)


def test_encrypted_or_otherwise_compressed_zip_is_refused(images, tmp_path):
    pack_zip(images, tmp_path / 'a.zip', zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match='png in it is encrypted, or compressed otherwise than by deflate'):
        archives.open_member(f'{tmp_path}/a.zip/train/0.png')


def test_archive_without_lists_is_explained(images, tmp_path):
    pack_tar(images, tmp_path / 'a.tar', ['train/1.png'])
    with pytest.raises(FileNotFoundError, match='no such member in the archive .*a.tar.*train_list.txt'):
        datasets.build_train(config.get_config(None, [*TINY, 'DATA.DATA_PATH', str(tmp_path / 'a.tar')]))


def test_missing_member_is_a_bad_image(images, tmp_path):
    data = as_shards(images, tmp_path)
    with open(data / 'val_list.txt', 'a') as file:
        file.write('even.tar/val/none.png 1\n')
    with pytest.raises(datasets.DataError, match='val_list.txt:12 .*none.png: no such member in the archive'):
        list(evaluation(data).epoch(0))
