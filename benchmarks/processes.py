"""Libraries in separate processes, which must answer within a time limit."""

import json
import os
import pathlib
import selectors
import subprocess

HERE = pathlib.Path(__file__).parent


class Worker:
    """A library in a separate process.

    Args:
        python: the interpreter that the library is installed for.
        library: the name of a module in `libraries`.
        limit: time limit for an answer, in seconds. After this time the process is killed and a new one is started,
            which creates again what it needs for the next requests.
    """

    def __init__(self, python: str, library: str, limit: float):
        self.python, self.library, self.limit = python, library, limit
        self._start()

    def _start(self):
        # The threads of a process must not spin while it waits for its turn.
        settings = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
        self.process = subprocess.Popen(
            [self.python, HERE / "worker.py", self.library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | settings,
        )
        hello = self.process.stdout.readline()
        if not hello:
            raise RuntimeError(f"`{self.python} {HERE / 'worker.py'} {self.library}` does not start: run it to see why")
        hello = json.loads(hello)
        self.methods, self.versions = hello["methods"], hello["versions"]

    def ask(self, limit: float | None = None, **request) -> dict:
        """Sends a request and waits for the answer. If there is none in time, the answer is an `error`."""
        limit = limit or self.limit
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            in_time = selector.select(limit)
        line = self.process.stdout.readline() if in_time else ""
        if line:
            return json.loads(line)
        self.process.kill()
        code = self.process.wait()
        self._start()
        return {"error": f"its process ended with {code}" if in_time else f"more than {limit:.0f} s"}
