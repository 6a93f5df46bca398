"""A torchrun whose ranks start in a tenth of a second: imports once, then forks an agent and its ranks for each
request.

What is forked is the real train.py in real processes over real gloo; only the ten seconds of importing are shared. The
agent behaves like torchrun's (with one rank like a shell): it forwards SIGTERM, dies of SIGUSR1, ends the other ranks
when one fails, and then kills them. Requests and reports are JSON lines on stdin and stdout.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time

GRACE_SECONDS = 8.0  # torchrun gives 30


def serve(preload: list[str]) -> None:
    for name in preload:
        importlib.import_module(name)
    from mambavision.ops.native_build import load_native

    load_native()  # compiled and loaded once, not by each training
    assert len(os.listdir("/proc/self/task")) == 1, "forking with other threads running is not safe"
    gc.freeze()  # a collection in a rank would copy all of the memory shared with the server
    report({"ready": os.getpid()})
    running = 0
    buffer = b""
    while True:
        if select.select([0], [], [], 0.02 if running else 1.0)[0]:
            received = os.read(0, 1 << 16)
            if not received:
                return
            buffer += received
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os._exit(agent(request))
            running += 1
            report({"id": request["id"], "pid": pid})
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            running -= 1
            report({"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def report(record: dict) -> None:
    os.write(1, json.dumps(record).encode() + b"\n")


def agent(request: dict) -> int:
    """Start the ranks, watch them, return torchrun's exit code."""
    os.setsid()
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: dict[int, int] = {}
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            become_rank(request, rank, port)  # does not return
        ranks[pid] = rank

    def forward(number: int, frame: object) -> None:
        for pid in ranks:
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    failed, kill_at = False, float("inf")
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            del ranks[pid]
            code = os.waitstatus_to_exitcode(status)
            if request["ranks"] == 1:
                return code if code >= 0 else 128 - code  # as `python train.py` without torchrun would end
            if code != 0 and not failed:
                failed, kill_at = True, time.monotonic() + GRACE_SECONDS
                forward(signal.SIGTERM, None)
            continue
        if time.monotonic() > kill_at:
            forward(signal.SIGKILL, None)
        time.sleep(0.02)
    return 1 if failed else 0


def become_rank(request: dict, rank: int, port: int) -> None:
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": request["ranks"],
        "LOCAL_WORLD_SIZE": request["ranks"],
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({k: str(v) for k, v in environment.items()} if request["ranks"] > 1 else {})
    os.environ.update(request["environment"])
    if "FAKE_WANDB" in os.environ:  # instead of the real one, if a part has imported it
        for name in [n for n in sys.modules if n.split(".")[0] == "wandb"]:
            del sys.modules[name]
        sys.path.insert(0, os.environ["FAKE_WANDB"])
    if "FILE_SIZE_LIMIT" in os.environ:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_SIZE_LIMIT"]), resource.RLIM_INFINITY))
    from mambavision.engine import faults

    faults.ORDERS[:] = faults.parse(os.environ.get("MAMBAVISION_FAULT", ""))
    time.sleep(rank * float(os.environ.get("START_SKEW_SECONDS", "0")))
    sys.argv = ["train.py", *request["arguments"]]
    import train

    try:
        train.main()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    # What may hang at the end of a process is kept; tearing the forked interpreter down object by object is not, as it
    # copies all of the memory that is shared with the server.
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    serve(sys.argv[1:])
