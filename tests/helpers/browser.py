"""Control a headless Chromium through a pipe, for the tests of pages. Needs no driver, package or port."""
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update', '--hide-scrollbars',
         '--remote-debugging-pipe']
BAD_EVENTS = {
    'Runtime.exceptionThrown', 'Runtime.consoleAPICalled', 'Log.entryAdded', 'Network.loadingFailed'}


def find():
    """Return the path of a Chromium on PATH, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """A running Chromium: with Browser() as browser: browser.open(path); browser.evaluate('1 + 1')."""

    def __enter__(self):
        self.profile = tempfile.mkdtemp(prefix='chromium')
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()
        # Chromium reads its commands from descriptor 3 and answers on 4
        shell = ['bash', '-c', f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}']
        command = [find(), *FLAGS, f'--user-data-dir={self.profile}', 'about:blank']
        self.process = subprocess.Popen(shell + command, pass_fds=(to_read, to_write),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.count, self.buffer, self.events, self.session = 0, b'', [], None
        target = self.send('Target.createTarget', url='about:blank')['targetId']
        self.session = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.send(f'{domain}.enable')
        return self

    def __exit__(self, *error):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)
        shutil.rmtree(self.profile, ignore_errors=True)

    def send(self, method, **params):
        self.count += 1
        message = {'id': self.count, 'method': method, 'params': params}
        if self.session:
            message['sessionId'] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b'\0')
        while (answer := self.receive()).get('id') != self.count:
            self.events.append(answer)
        assert 'error' not in answer, answer
        return answer['result']

    def receive(self, patience=60):
        until = time.monotonic() + patience
        while b'\0' not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], max(0, until - time.monotonic()))
            assert ready, 'Chromium does not answer'
            part = os.read(self.read_end, 1 << 16)
            assert part, 'Chromium has ended'
            self.buffer += part
        message, self.buffer = self.buffer.split(b'\0', 1)
        return json.loads(message)

    def open(self, path, width=1280, height=900, dark=False):
        """Load a file and wait for it; `problems()` has its console messages and requests."""
        self.events = []
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
        self.send('Emulation.setEmulatedMedia', features=[scheme])
        self.send('Page.navigate', url=f'file://{os.path.abspath(path)}')
        while not any(event['method'] == 'Page.loadEventFired' for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression):
        result = self.send('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def problems(self):
        """Return exceptions, console messages, and requests for anything but files and data URIs."""
        found = []
        for event in self.events:
            if event['method'] in BAD_EVENTS:
                found.append(event)
            elif event['method'] == 'Network.requestWillBeSent':
                url = event['params']['request']['url']
                if not url.startswith(('file:', 'data:')):
                    found.append(url)
        return found

    def screenshot(self, path):
        """Write the whole page as a PNG file."""
        data = self.send('Page.captureScreenshot', captureBeyondViewport=True)['data']
        with open(path, 'wb') as file:
            file.write(base64.b64decode(data))
