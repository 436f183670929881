# SPDX-License-Identifier: Apache-2.0
"""Compile the kernel libraries: one per instruction set, each with its own flags, in seconds.

`python -m quantvla_ros.kernels.cpu.build` builds beside the sources; setup.py builds into the
package that it installs. Without a compiler nothing fails: the reference serves, and says so.
Imports nothing but the standard library, because setup.py runs it before anything is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
COMMON = ('-std=c++17', '-O3', '-fPIC', '-pthread', '-fvisibility=hidden', '-fno-math-errno',
          '-fno-trapping-math', '-Wall', '-Wextra', '-Wno-subobject-linkage', '-Wno-psabi',
          '-Wno-uninitialized', '-Wno-maybe-uninitialized')
AVX2 = ('-mavx2', '-mfma')
AVX512 = (*AVX2, '-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq', '-mavx512vnni')
# path -> (machine or '', source, flags)
TARGETS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    'amx': ('x86_64', 'amx.cpp', (*AVX512, '-mamx-tile', '-mamx-int8')),
    'avx512vnni': ('x86_64', 'avx512vnni.cpp', AVX512),
    'avx2vnni': ('x86_64', 'avx2.cpp', (*AVX2, '-mavxvnni')),
    'avx512vl': ('x86_64', 'avx2.cpp', (*AVX2, '-mavx512f', '-mavx512vl', '-mavx512vnni')),
    'avx2': ('x86_64', 'avx2.cpp', AVX2),
    'i8mm': ('aarch64', 'i8mm.cpp', ('-march=armv8.2-a+dotprod+i8mm',)),
    'dotprod': ('aarch64', 'dotprod.cpp', ('-march=armv8.2-a+dotprod',)),
    'scalar': ('', 'scalar.cpp', ()),
}


def compiler() -> str | None:
    """Return the C++ compiler: $CXX, else g++, clang++ or c++, whichever is there first."""
    for name in (os.environ.get('CXX', ''), 'g++', 'clang++', 'c++'):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def command(path: str, cxx: str, output: Path, extra: Sequence[str] = ()) -> list[str]:
    """Return the compiler's command line for one path."""
    _, source, flags = TARGETS[path]
    return [*cxx.split(), *COMMON, *flags, '-shared', *extra, str(FOLDER / source), '-o',
            str(output)]


def build(target: Path = FOLDER) -> dict[str, str]:
    """Compile every path of this machine into target; path -> '' or why it was not built.

    A path that this compiler is too old for is left out; the others are built.
    """
    cxx = compiler()
    wanted = [p for p, (machine, _, _) in TARGETS.items() if machine in ('', platform.machine())]
    if cxx is None:
        return dict.fromkeys(wanted, 'no C++ compiler: install g++ (Debian: apt install g++)')
    target.mkdir(parents=True, exist_ok=True)
    running = {}
    for path in wanted:
        fresh = target / f'.libquantvla_{path}.so.{os.getpid()}'
        running[path] = (fresh, subprocess.Popen(
            command(path, cxx, fresh), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True))
    results = {}
    for path, (fresh, process) in running.items():
        said, _ = process.communicate()
        if process.returncode:
            results[path] = (said.strip().splitlines() or ['the compiler failed'])[-1]
            fresh.unlink(missing_ok=True)
        else:
            results[path] = ''
            fresh.replace(target / f'libquantvla_{path}.so')  # at once: never half a library
    return results


def build_commands() -> dict[str, type]:
    """Return the setuptools commands that compile the kernels; for cmdclass in setup.py."""
    from setuptools.command.build_py import build_py

    class BuildWithKernels(build_py):
        """build_py, then the kernels: beside the sources for an editable install."""

        def run(self) -> None:
            super().run()
            target = FOLDER if self.editable_mode else (
                Path(self.build_lib) / 'quantvla_ros' / 'kernels' / 'cpu')
            report(build(target))

    return {'build_py': BuildWithKernels}


def report(results: dict[str, str]) -> int:
    """Print what was built and what was not, and return how many paths failed."""
    for path, problem in results.items():
        print(f'kernel {path}: {problem or "built"}', file=sys.stderr)
    if all(results.values()):
        print('No integer kernel was built; the package runs on its slow reference.',
              file=sys.stderr)
    return sum(map(bool, results.values()))


if __name__ == '__main__':
    sys.exit(report(build()))
