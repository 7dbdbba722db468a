"""A server on localhost that answers as the Hugging Face hub does, for the models that it is given."""
import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = '0123456789abcdef0123456789abcdef01234567'


class Hub:
    """Serves `repos`, {'owner/model': {file name: bytes}}, at `url`; `asked` counts (method, path).

    A repo of None is one with terms to accept. A `silent` hub takes connections and never answers.
    """

    def __init__(self, repos, silent=False):
        self.repos, self.asked, self.stopped = repos, Counter(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self):
                hub.asked[self.command, self.path] += 1
                if silent:
                    hub.stopped.wait(60)
                    self.close_connection = True
                    return
                self.answer(*hub.answer(self.path))

            do_HEAD = do_GET

            def answer(self, status, body, headers):
                self.send_response(status)
                for name, value in {'Content-Length': len(body), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command == 'GET':
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def answer(self, path):
        """-> status, body, headers"""
        parts = path.split('?')[0].strip('/').split('/')
        api = parts[:2] == ['api', 'models']
        repo = '/'.join(parts[2:4] if api else parts[:2])
        if repo not in self.repos:
            return 401, b'{}', {'X-Error-Code': 'RepoNotFound', 'X-Error-Message': 'Repository not found'}
        files = self.repos[repo]
        if files is None:
            return (
                403,
                b'{}',
                {'X-Error-Code': 'GatedRepo', 'X-Error-Message': 'Access to this model is restricted'},
            )
        if api:
            body = json.dumps(
                {'id': repo, 'sha': COMMIT, 'siblings': [{'rfilename': name} for name in files]}
            ).encode()
            return 200, body, {'Content-Type': 'application/json'}
        _, _, verb, revision, name = parts
        assert verb == 'resolve'
        if revision not in ('main', COMMIT):
            return (
                404,
                b'{}',
                {'X-Error-Code': 'RevisionNotFound', 'X-Error-Message': f'Invalid rev id: {revision}'},
            )
        if name not in files:
            return (
                404,
                b'',
                {
                    'X-Error-Code': 'EntryNotFound',
                    'X-Error-Message': 'Entry not found',
                    'X-Repo-Commit': COMMIT,
                },
            )
        return (
            200,
            files[name],
            {
                'ETag': f'"{hashlib.sha256(files[name]).hexdigest()}"',
                'X-Repo-Commit': COMMIT,
                'Accept-Ranges': 'bytes',
                'Content-Type': 'application/octet-stream',
            },
        )

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


def environment(home, url):
    """The variables with which huggingface_hub asks the server at `url`, and caches below `home`."""
    return {
        'HF_HOME': str(home),
        'HF_HUB_CACHE': str(home / 'hub'),
        'HF_ENDPOINT': url,
        'HF_HUB_OFFLINE': '0',
        'HF_TOKEN': '',
        'TRANSFORMERS_OFFLINE': '0',
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'NO_PROXY': '127.0.0.1',
        'no_proxy': '127.0.0.1',
    }
