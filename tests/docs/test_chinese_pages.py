"""The Chinese pages: they say what the English ones say, as far as a program can tell.

The tests of the English pages run the commands, and the Chinese pages have the same ones.
"""
import re

import pytest
from pages import CHINESE, text_of

pytestmark = pytest.mark.parametrize('page', CHINESE)
LEFT_OUT = {'README_cn.md': ('## From a list file to a record', '## Verified and not verified')}
BLOCK = re.compile(r'```\w*\n(.*?)```', re.S)
COMMENT = re.compile(r'(?:^|\s+)# .*$', re.M)
CODE = re.compile(r'`([^`]+)`')
NUMBER = re.compile(r'\d[\d.,]*\d|\d')
SHAPE = re.compile(r'^(#+ |\||- |!\[)', re.M)       # headings, rows of tables, items of lists, pictures


def both(page):
    """Return the texts of the Chinese and of the English page, the latter without the parts left out."""
    theirs = text_of(CHINESE[page])
    if page in LEFT_OUT:
        first, last = LEFT_OUT[page]
        theirs = theirs[:theirs.index(first)] + theirs[theirs.index(last):]
    return text_of(page), theirs


def rows(text):
    return '\n'.join(line for line in text.splitlines() if line.startswith('|'))


def test_blocks_are_equal_but_for_comments(page):
    ours, theirs = ([COMMENT.sub('', block) for block in BLOCK.findall(text)] for text in both(page))
    assert ours == theirs


def code_in_sentences(text):
    return {' '.join(code.split()) for code in CODE.findall(BLOCK.sub('', text))}


def test_options_files_and_commands_within_the_text_are_equal(page):
    ours, theirs = map(code_in_sentences, both(page))
    assert ours == theirs, {'only in Chinese': ours - theirs, 'only in English': theirs - ours}


def test_numbers_of_tables_are_equal(page):
    ours, theirs = (sorted(NUMBER.findall(rows(text))) for text in both(page))
    assert ours == theirs


def test_headings_rows_items_and_pictures_are_as_many(page):
    ours, theirs = (SHAPE.findall(BLOCK.sub('', text)) for text in both(page))
    assert ours == theirs


def test_the_pages_link_to_each_other(page):
    name = page.rpartition('/')[2]
    in_docs = page.startswith('docs/')
    here = f'[English](../{name}) | 简体中文' if in_docs else '[English](README.md) | 简体中文'
    there = f'English | [简体中文]({"cn/" if in_docs else ""}{name})'
    assert [text.splitlines()[2] for text in both(page)] == [here, there]
