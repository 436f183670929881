# SPDX-License-Identifier: Apache-2.0
"""How much memory is left for a second policy. Reads the kernel's figures, decides nothing."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path('/proc/meminfo')
CGROUP = Path('/sys/fs/cgroup')


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Return what can be taken without swapping: of the machine, and of a container's limit.

    Pages of files that the kernel can drop count as available, as in MemAvailable.
    """
    found = [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines()
             if line.startswith('MemAvailable:')]
    limit = _number(cgroup / 'memory.max')
    used = _number(cgroup / 'memory.current')
    if limit is not None and used is not None:
        found.append(limit - used + _droppable(cgroup / 'memory.stat'))
    return min(found, default=0)


def room_problem(name: str, needed: int, available: int, reserve: int) -> str:
    """Say why there is no room for a second policy, with the figures; '' when there is."""
    if needed + reserve <= available:
        return ''
    return (
        f'{name} needs about {needed / 1e6:.0f} MB beside the running one; {available / 1e6:.0f} '
        f'MB are available, of which {reserve / 1e6:.0f} MB stay free (swap.reserve_mb); set '
        'swap.mode to hold: the arm comes to rest, the running one is freed first, then it goes on'
    )


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # 'max' is no limit


def _droppable(path: Path) -> int:
    try:
        rows = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get('inactive_file', 0))
