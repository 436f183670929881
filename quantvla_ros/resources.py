# SPDX-License-Identifier: Apache-2.0
"""Find the package's own files (config, models, launch) installed or in a source tree.

Looks, in this order, in the ament share folder, below sys.prefix (pip) and beside the package
(source tree). Names every folder it tried when a file is missing. Downloads nothing.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

PACKAGE = 'quantvla_ros'


def share_folders() -> list[Path]:
    """Every folder that may hold the package's files, best first."""
    source_tree = Path(__file__).resolve().parent.parent
    folders = [source_tree] if (source_tree / 'package.xml').is_file() else []
    prefixes = [p for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    folders += [Path(prefix) / 'share' / PACKAGE for prefix in (*prefixes, sys.prefix)]
    return folders


def share_path(relative: str) -> Path:
    """Return the path of one of the package's own files or folders.

    Raises FileNotFoundError that names every path tried.
    """
    tried = [folder / relative for folder in share_folders()]
    for path in tried:
        if path.exists():
            return path
    raise FileNotFoundError(
        f'{relative!r} is not part of this installation; tried '
        + ', '.join(str(path) for path in tried)
        + '. Reinstall the package, or give an absolute path.'
    )


def cache_folder() -> Path:
    """Where things made once on this machine are kept; QUANTVLA_CACHE overrides it."""
    root = os.environ.get('QUANTVLA_CACHE')
    base = Path(root) if root else Path.home() / '.cache' / PACKAGE
    base.mkdir(parents=True, exist_ok=True)
    return base


def peak_bytes() -> int:
    """Return the peak of resident memory of this program.

    From /proc, which starts anew with each program; getrusage, elsewhere, also counts what the
    parent held when it started this one.
    """
    status = Path('/proc/self/status')
    if status.is_file():
        for line in status.read_text().split('\n'):
            if line.startswith('VmHWM:'):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_free_memory() -> None:
    """Give pages that were freed back to the system, where the C library can (glibc).

    Freed weights of some MiB leave holes between small things that stay; while a large model is
    read layer by layer the holes came to 0.4 GiB.
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)
