"""Text for consoles and logs: no name of a file may end a program or control the terminal that shows it."""
import re
import sys

# Control characters but tab and line feed, other line separators, marks that reverse the order of writing, and surrogates, by
# which Python keeps the bytes of a name that is no text.
UNSAFE = re.compile('[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]')


def visible(text: object) -> str:
    """Replace the characters of a text that a terminal obeys or cannot show by escapes, such as \\x1b for Escape."""
    return UNSAFE.sub(_escape, str(text))


def _escape(match):
    code = ord(match[0])
    return f'\\x{code:02x}' if code < 256 else f'\\u{code:04x}'


def prepare() -> None:
    """Let the standard streams escape what their encoding lacks, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
