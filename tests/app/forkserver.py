"""Runs the command line in forked children of one process that has imported everything: a real process each, without
paying for the imports again.

Reads one JSON object a line: {"arguments": [...], "cwd": folder, "out": file, "err": file, "limit": bytes or null, "arm":
pattern or null}; answers {"code": exit code}. With a limit the child may not write a file longer than that, which is what a
full disk looks like: from the start, or once a path matches `arm`.
"""

from __future__ import annotations

import glob
import json
import os
import resource
import sys
import time

import diffexpo.build  # noqa: F401  (what a command would import)
from diffexpo.cli.main import main


def child(request: dict) -> int:
    """The command; what is done here is what a shell would do."""
    os.chdir(request["cwd"])
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT),
        (2, request["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(name, flags, 0o644), number)
    sys.argv = ["diffexpo", *request["arguments"]]
    if request["limit"] is not None and request["arm"] is None:
        set_limit(0, request["limit"])
    try:
        main(request["arguments"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def set_limit(pid: int, size: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def run(request: dict) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = child(request)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    while request["arm"] is not None:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if glob.glob(request["arm"]):
            set_limit(pid, request["limit"])
            break
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    # Answers have a descriptor of their own, so that nothing printed can mix with them.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            print(json.dumps({"code": run(json.loads(line))}), file=answers, flush=True)
