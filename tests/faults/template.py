"""The process that workers are forked from: it has imported everything, read the checkpoint and made the lone engine's
answers. `python -m tests.faults.template <checkpoint> <references>`; each line of its input is a `Spec` to fork."""

import json
import os
import random
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from shared.blocks import token_ids
from shared.engine.engine import PagedEngine
from shared.engine.port import EngineLimits
from shared.engine.torch_runner import TorchRunner
from shared.engine.weights import load_checkpoint
from tests.engine_driver import Driver, greedy, request
from tests.faults.worker import MAX_CONTEXT, Spec, reference, work_as
from tests.tiny_checkpoints import VOCAB_SIZE

NUM_PROMPTS = 8
NUM_NEW = 10


def lone_references(checkpoint):
    """Of some prompts whose answers do not end early, by ids."""
    engine = PagedEngine(
        TorchRunner(checkpoint, 32), checkpoint.model("tiny"), EngineLimits(MAX_CONTEXT, 32, 4, max_batch_tokens=512)
    )
    driver = Driver(engine)
    rng = random.Random(6)
    references = {}
    while len(references) < NUM_PROMPTS:
        ids = token_ids([rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(150, 380))])
        key = f"lone {len(references)}"
        held = replace(request(f"{key}, held", ids, greedy(NUM_NEW)), hold_kv=True, cache_salt="held")
        (answer, _) = driver.serve(request(key, ids, greedy(NUM_NEW)), held)
        if len(answer) == NUM_NEW:
            references[ids.tobytes()] = reference(engine, ids, answer, driver.held_pages[held.key])
        driver.abort(held.key)
    driver.assert_all_free()
    return references


def main():
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    checkpoint = load_checkpoint(Path(sys.argv[1]), "float32", torch.device("cpu"))
    references = lone_references(checkpoint)
    answers = {ids.hex(): each.answer for ids, each in references.items()}
    Path(sys.argv[2]).write_text(json.dumps(answers))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while line := sys.stdin.readline():
        spec = Spec(**json.loads(line))
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(0)
            try:
                work_as(spec, checkpoint, references)
            except BaseException:  # noqa: BLE001 - it is written down, and the process ends
                traceback.print_exc()
            finally:
                os._exit(1)


if __name__ == "__main__":
    main()
