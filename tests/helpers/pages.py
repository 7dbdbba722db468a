"""Read the README and the docs: their text, their commands, and the tools whose parsers check these."""
from __future__ import annotations

import os
import re
import shlex

from tools import (
    check_data,
    eval_all,
    export,
    follow,
    make_lists,
    metrics,
    port_weights,
    predict,
    prepare_imagenet,
    probe,
    report,
    verify_gpu,
    visualize,
)

from runs import ROOT

from dev import benchmark

DOCS = sorted(f'docs/{name}' for name in os.listdir(os.path.join(ROOT, 'docs')) if name.endswith('.md'))
PAGES = ['README.md', 'CONTRIBUTING.md', *DOCS]
CHINESE = {'README_cn.md': 'README.md'}             # Chinese page: the English page that it says the same as
CHINESE.update({f'docs/cn/{name}': f'docs/{name}' for name in sorted(os.listdir(f'{ROOT}/docs/cn'))})
MODULES = (benchmark, check_data, eval_all, export, follow, make_lists, metrics, port_weights, predict,
           prepare_imagenet, probe, report, verify_gpu, visualize)
TOOLS = {module.__name__.split('.')[-1]: module for module in MODULES}
INLINE = r'`((?:[A-Z_]+=\S+\s)*(?:python\s(?:-m \w|tools/|dev/|main_)|\./run_\w+\.sh)[^`]*)`'


def text_of(page: str) -> str:
    """Return the text of a page, whose path is relative to the root."""
    with open(os.path.join(ROOT, page), encoding='utf-8') as file:
        return file.read()


def commands(page: str) -> list[list[str]]:
    """Return the commands of a page's bash blocks, then those in its text, each as a list of words."""
    text = text_of(page)
    lines = []
    for block in re.findall(r'```bash\n(.*?)```', text, re.S):
        lines += block.replace('\\\n', ' ').splitlines()
    lines += [' '.join(code.split()) for code in re.findall(INLINE, text)]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words]
