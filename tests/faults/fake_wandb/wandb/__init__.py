"""A W&B client that misbehaves as FAKE_WANDB_MODE says and writes every call down in $FAKE_WANDB_CALLS.

It stands in for the network, which the tests cannot have; what the real client does offline is tested with the real
one.
"""

import json
import os
import threading
import time

MODE = os.environ.get("FAKE_WANDB_MODE", "")
never = threading.Event()


def record(call, **fields):
    with open(os.environ["FAKE_WANDB_CALLS"], "a") as file:
        file.write(json.dumps({"call": call, "time": time.time(), **fields}) + "\n")


def login(prompt: bool = True) -> bool:
    return True


class api:
    api_key = "x" * 40


class CommError(Exception):
    pass


def Settings(**fields):
    return fields


class Run:
    def __init__(self):
        self.summary = {}

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values):
        record("log", step=values["step"], loss=values.get("train/loss"))
        if MODE == "log_raises":
            raise CommError("502 Bad Gateway")
        if MODE == "log_blocks":
            never.wait()

    def finish(self):
        record("finish")


def init(*, mode, id, resume, **rest):
    record("init", mode=mode, id=id, resume=resume)
    if MODE == "init_raises" and mode == "online":
        raise CommError("Run initialization has timed out after 20.0 sec.")
    if MODE == "init_blocks":
        never.wait()
    return Run()


def teardown():
    record("teardown")
