"""Runs the command line in forked children of one process that has imported everything: a real process each, in a session of its
own, without paying for the imports again.

Reads one JSON object a line and answers each with one. {"start": [argument, ...], "module": name or null, "cwd": folder, "out": file,
"err": file, "environment": {name: value}, "limit": bytes or null} answers {"pid": number}; with a module the child is
`python -W error -m module ARGUMENTS` instead; with a limit it may not write a file longer than that, which is what a full disk looks like. {"wait": pid, "block": true or false} answers {"code": exit code, or null while it runs}.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import signal
import sys
import traceback
import warnings

import diffexpo.assembly.actions
import diffexpo.assembly.runs
import diffexpo.assembly.sweeping
import diffexpo.assembly.verifying
import diffexpo.policies.unet
import diffexpo.rewards.python_file  # noqa: F401  (what a command would import)
from diffexpo.cli.main import main
from diffexpo.config.explain import settings
from diffexpo.evaluation.figures import draw_figure
from diffexpo.evaluation.templates import template


def prepare() -> None:
    """What many commands would make anew: templates of pages, fonts, the table of settings. No tensor is computed here, for
    torch's threads would not live on in a child."""
    for page in ("report.html.j2", "card.md.j2"):
        template(page)
    draw_figure("any", lambda axes: str(axes.plot([0.0, 1.0], label="any")))
    settings()


def child(request: dict) -> int:
    """The command; what is done here is what a shell would do."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT),
        (2, request["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(name, flags, 0o644), number)
    sys.argv = [request["module"] or "diffexpo", *request["start"]]
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))
    try:
        if request["module"] is None:
            main(request["start"])
        else:
            warnings.simplefilter("error")
            # A launcher that forks its workers while its own threads wait.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:  # noqa: BLE001 - whatever it is, the test shall see it
        traceback.print_exc()
        return 1
    return 0


def start(request: dict) -> int:
    """The pid of a child that runs the command."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = child(request)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return pid


def wait(pid: int, block: bool) -> int | None:
    """Exit code as `subprocess` gives it (minus the signal's number when killed), None while it runs."""
    done, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


if __name__ == "__main__":
    prepare()
    gc.freeze()  # children share what was imported instead of copying it when they collect
    gc.enable()
    # Answers have a descriptor of their own, so that nothing printed can mix with them.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            answer = (
                {"pid": start(request)}
                if "start" in request
                else {"code": wait(request["wait"], request["block"])}
            )
            print(json.dumps(answer), file=answers, flush=True)
