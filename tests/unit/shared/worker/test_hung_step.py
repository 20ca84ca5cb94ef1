"""A worker process whose step hangs ends at once, though threads and devices would hold it."""

import subprocess
import sys
import textwrap


def test_the_process_ends_with_a_last_line_whatever_still_runs():
    program = textwrap.dedent(
        """
        import asyncio, threading
        from shared.errors import StepHangs
        from shared.observe import log
        from shared.worker import process

        class Worker:
            async def run(self, stop):
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self.hang())

            async def hang(self):
                raise StepHangs("hangs")

        threading.Thread(target=threading.Event().wait).start()  # no daemon: an ordinary end would wait for it
        log.configure("info")
        asyncio.run(process._run_or_exit(Worker(), asyncio.Event(), log.logger("decode")))
        """
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "an engine step hangs" in ended.stdout + ended.stderr
