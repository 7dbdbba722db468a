"""Find the images in a folder: each real folder and file once; what is left out is counted."""
from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

from data import bands, image_files

TRUSTED = frozenset((                               # endings of images
    '.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.apng', '.webp', '.gif', '.bmp', '.dib',
    '.tif', '.tiff', '.ppm', '.pgm', '.pbm', '.pnm', *(['.avif'] if 'AVIF' in image_files.FORMATS else [])))
# folders of thumbnails: of NAS systems, macOS, Windows
THUMBNAILS = frozenset(('@eadir', '__macosx', '#recycle', '@recycle', '$recycle.bin'))
TWICE = 'linked again'


@dataclass
class Found:
    """The images in a folder, as sorted relative paths, and how many files were left out, by reason."""
    images: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def explain(self, before: str = '') -> str:
        """Return the reasons after the text `before`, the most frequent first; '' without any."""
        parts = [f'{reason} ({count})' for reason, count in self.left_out.most_common()]
        return before + ', '.join(parts) if parts else ''


def find_images(folder: str, parts: tuple[str, ...] = ('',), ignore: tuple[str, ...] = ()) -> Found:
    """Find the images in a folder and its subfolders, or only in the subfolders `parts`.

    A known ending makes a file an image; of all other files the content decides. Hidden files and
    folders are left out, and those of thumbnails. A link counts only if it leads to something that is
    not found without links, and only once. Files with a relative path in `ignore` are not even counted.
    """
    search = _Search(os.path.realpath(folder), ignore)
    for part in parts:
        path = os.path.join(folder, part)
        if part and os.path.islink(path):
            search.links.append((path, part))
        else:
            search.walk(path, part)
    while search.links:                             # after all that is here without links
        search.follow(*search.links.pop(0))
    return Found(sorted(search.images()), search.left_out)


def is_hidden(name: str) -> bool:
    """True if a file or folder of this name does not count."""
    return name.startswith('.') or name.lower() in THUMBNAILS


class _Search:
    def __init__(self, root: str, ignore: tuple[str, ...]):
        self.root, self.ignore = root, ignore
        self.left_out: Counter[str] = Counter()
        self.seen: set[tuple[int, int]] = set()     # (device, inode) of each folder
        # (real path, relative path, names of the images) of each folder
        self.folders: list[tuple[str, str, list[str]]] = []
        self.links: list[tuple[str, str]] = []      # (path, relative path) of links to folders
        self.linked_files: list[tuple[str, str]] = []          # and of links to images

    def walk(self, path: str, relative: str) -> None:
        """Search a folder with its subfolders, but not through links."""
        left = [(os.path.realpath(path), relative)]
        while left:
            real, relative = left.pop()
            status = os.stat(real)
            if (status.st_dev, status.st_ino) in self.seen:
                self.left_out[f'folders {TWICE}'] += 1
                continue
            self.seen.add((status.st_dev, status.st_ino))
            names = []
            with os.scandir(real) as entries:
                for entry in entries:
                    below = os.path.join(relative, entry.name)
                    if below in self.ignore or self._is_hidden(entry):
                        continue
                    if entry.is_symlink():
                        self._note_link(entry.path, below)
                    elif entry.is_dir(follow_symlinks=False):
                        left.append((entry.path, below))
                    elif self._is_image(entry.path, entry.is_file(follow_symlinks=False)):
                        names.append(entry.name)
            self.folders.append((real, relative, names))

    def _is_hidden(self, entry: os.DirEntry) -> bool:
        if not is_hidden(entry.name):
            return False
        if entry.is_dir(follow_symlinks=False):
            count = sum(len(files) for _, _, files in os.walk(entry.path))
            self.left_out[f'in {entry.name}'] += count
        else:
            self.left_out['hidden'] += 1
        return True

    def _note_link(self, path: str, relative: str) -> None:
        if os.path.isdir(path):
            self.links.append((path, relative))
        elif not os.path.exists(path):
            self.left_out['broken links'] += 1
        elif self._is_image(path, os.path.isfile(path)):
            self.linked_files.append((os.path.realpath(path), relative))

    def _is_image(self, path: str, is_file: bool) -> bool:
        if not is_file:
            self.left_out['special files'] += 1
            return False
        ending = os.path.splitext(path)[1].lower()
        if ending in TRUSTED or image_files.is_image(path) or bands.is_array(path):
            return True
        self.left_out[ending or 'without an ending'] += 1
        return False

    def follow(self, path: str, relative: str) -> None:
        """Search the folder that a link leads to, unless the root lies in it."""
        real = os.path.realpath(path)
        if self.root == real or self.root.startswith(os.path.join(real, '')):
            self.left_out[f'folders {TWICE}'] += 1
        else:
            self.walk(real, relative)

    def images(self) -> list[str]:
        """Return the relative paths of all images."""
        images: list[str] = []
        real: set[str] = set()
        for folder, relative, names in self.folders:
            images += [os.path.join(relative, name) for name in names]
            if self.linked_files:                   # the set takes memory
                real.update(os.path.join(folder, name) for name in names)
        for path, relative in sorted(self.linked_files):
            if path in real:
                self.left_out[f'images {TWICE}'] += 1
            else:
                real.add(path)
                images.append(relative)
        return images
