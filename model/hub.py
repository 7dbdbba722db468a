"""Find a weight file: on the disk, or as a model of the Hugging Face hub, which is fetched into its cache."""
import http.client
import logging
import os
import re
import urllib.error
import urllib.request

PREFIX = re.compile(r'^hf[-_]hub:')
NAME = re.compile(r'[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?')      # OWNER/MODEL[@REVISION]
FILES = ('model.safetensors', 'pytorch_model.bin')          # in timm's repositories, the safe format first
ENDINGS = ('.pdparams', '.pdckpt', '.safetensors', '.pth', '.pt', '.tar', '.bin')     # of files only
ERRORS = (                                          # of huggingface_hub, the special ones first
    ('GatedRepoError', 'wants the terms of this model accepted on its page, and your HF_TOKEN'),
    ('RepositoryNotFoundError',
     'has no such public model; check the spelling, or set HF_TOKEN for a private one'),
    ('RevisionNotFoundError', 'has no such revision of it'),
    ('LocalEntryNotFoundError', 'stopped answering; try again'),
    ('EntryNotFoundError', f'has neither {" nor ".join(FILES)} of it'),
    ('HFValidationError', 'has no models with such names; write OWNER/MODEL'),
)


def find(path: str) -> str:
    """Return the file for `path`: `path` itself, `path` with .pdparams, or a file fetched from the hub.

    A folder stands for the file of FILES in it, also with timm's prefix local-dir.
    Raises FileNotFoundError, and ValueError as `fetch`.
    """
    folder = path.removeprefix('local-dir:')
    for name in (path, f'{path}.pdparams', *(os.path.join(folder, file) for file in FILES)):
        if os.path.isfile(name):
            return name
    if PREFIX.match(path) or _is_hub_name(path):
        return fetch(path)
    raise FileNotFoundError(f'{path}: no such file')


def _is_hub_name(path: str) -> bool:
    """True if `path` reads as OWNER/MODEL, and not as a file in a folder that exists."""
    is_file_name = path.endswith(ENDINGS) or os.path.exists(os.path.dirname(path))
    return bool(NAME.fullmatch(path)) and not is_file_name


def fetch(name: str) -> str:
    """Download the weight file of a hub model, [hf-hub:]OWNER/MODEL[@REVISION], or take it from the cache.

    huggingface_hub reads HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN. Of several processes one
    downloads and the others wait. Raises ValueError with the reason of a failure.
    """
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError:
        needed = 'models of the Hugging Face hub need pip install huggingface_hub'
        raise ValueError(f'{name}: no such file; {needed}') from None
    for client in ('httpx', 'httpx2'):              # Paddle would log each of their requests on the console
        logging.getLogger(client).setLevel(logging.WARNING)
    repo, _, revision = PREFIX.sub('', name).partition('@')
    if constants.HF_HUB_OFFLINE:
        problem = 'may not be asked (HF_HUB_OFFLINE)'
    else:
        problem = _unreachable(constants.ENDPOINT)
    for file in FILES:
        try:
            return hf_hub_download(repo, file, revision=revision or None, local_files_only=bool(problem))
        except Exception as error:                  # huggingface_hub documents no common class
            last = error
            if 'EntryNotFoundError' not in _classes(error):
                break                               # the other file would fail in the same way
    reason = f'{problem}, and the cache has no weights of it'
    if not problem or 'LocalEntryNotFoundError' not in _classes(last):
        reason = _explained(last)
    raise ValueError(f'{name}: no such file, and the hub ({constants.ENDPOINT}) {reason}') from last


def _classes(error: Exception) -> set[str]:
    """Return the names of the classes of an error; those of huggingface_hub move between its modules."""
    return {kind.__name__ for kind in type(error).__mro__}


def _explained(error: Exception) -> str:
    """Return the reason for an error of huggingface_hub in words."""
    for kind, text in ERRORS:
        if kind in _classes(error):
            return text
    return f'fails: {type(error).__name__}: {error}'


def _unreachable(url: str, seconds: float = 10) -> str:
    """Return why no HTTP server answers at `url` within `seconds`, or ''.

    huggingface_hub would retry for minutes.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=seconds):
            return ''
    except urllib.error.HTTPError:                  # an answer
        return ''
    except (OSError, ValueError, http.client.HTTPException) as error:
        if 'SSL' in str(error):                     # huggingface_hub has its own certificates
            return ''
        reason = getattr(error, 'reason', error)
        return f'cannot be reached ({reason}: check the network, HF_ENDPOINT and the proxy)'
