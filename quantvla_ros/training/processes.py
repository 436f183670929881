# SPDX-License-Identifier: Apache-2.0
"""Many processes over a list of jobs, each job leaving files: no pool to hang, no lock to hold.

Process p takes jobs p, p + P, ...; a process that dies or runs out of time costs its own
remaining jobs and nothing else, and is reported. Starts only processes of its own.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from quantvla_ros.sim.gpus import renders_on

Say = Callable[[str], None]
PROGRESS_S = 10.0


def run_jobs(
    work: Callable[..., None],
    jobs: Sequence[Sequence[Any]],
    count: Callable[[], int],
    total: int,
    limit_s: float,
    what: str,
    say: Say,
) -> int:
    """Run work(*arguments) once per list of arguments, each in its own process.

    count tells how much is done, for the progress line. Returns the number of processes that
    were stopped at the limit or ended badly.
    """
    context, started = mp.get_context('spawn'), time.monotonic()
    os.environ['OMP_NUM_THREADS'] = os.environ['OPENBLAS_NUM_THREADS'] = '1'
    team = []
    for index, arguments in enumerate(jobs):
        process = context.Process(target=work, args=tuple(arguments), daemon=True)
        with renders_on(index):
            process.start()
        team.append(process)
    told = 0.0
    while any(process.is_alive() for process in team):
        passed = time.monotonic() - started
        if passed > limit_s:
            break
        if passed - told > PROGRESS_S:
            told = passed
            done = count()
            left = passed / max(done, 1) * max(total - done, 0)
            say(f'{what}: {done}/{total} after {passed:.0f} s, about {left:.0f} s left')
        time.sleep(0.2)
    late = [process for process in team if process.is_alive()]
    for process in late:
        process.terminate()
    for process in team:
        process.join()
    bad = sum(process.exitcode != 0 for process in team)
    say(f'{what}: {count()}/{total} in {time.monotonic() - started:.0f} s by {len(team)} '
        f'processes, {len(late)} stopped at the limit, {bad - len(late)} died')
    return bad
