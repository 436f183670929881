# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels' own tests, in processes that alone see Triton."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import quantvla_ros

ROOT = Path(quantvla_ros.__file__).resolve().parent.parent
TESTS = ROOT / 'test' / 'triton'
SIDE = ROOT / '.triton'
COMPILED = ['test_compile.py', 'test_launch.py']  # the others are interpreted
NETWORKS = ['test_plans.py']
# few processes: each takes seconds to begin
GROUPS = {
    'networks': NETWORKS, 'compiled': COMPILED,
    'kernels': [path.name for path in sorted(TESTS.glob('test_*.py'))
                if path.name not in NETWORKS + COMPILED],
}


def triton():
    """Folders to import Triton from, [] where every process sees it. Skips where there is none."""
    if (SIDE / 'triton').is_dir():
        return [str(SIDE)]
    if importlib.util.find_spec('triton') is None:
        pytest.skip('Triton is not installed: bash .ci/triton-tools')
    return []


def environment(group):
    """Variables of the process."""
    paths = [str(ROOT), *triton()]
    kept = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    kept.update(PYTHONPATH=os.pathsep.join(paths), QUANTVLA_TRITON_TESTS='1',
                OMP_NUM_THREADS='1')
    return kept if group == 'compiled' else {**kept, 'TRITON_INTERPRET': '1'}


@pytest.fixture(scope='module')
def runs():
    """Every group's process, two at a time: group -> its end, waited for."""
    def run(group):
        files = [str(TESTS / file) for file in GROUPS[group]]
        return subprocess.run(
            [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', *files],
            env=environment(group), cwd=ROOT, capture_output=True, text=True, timeout=900)

    triton()  # skips before anything starts
    with ThreadPoolExecutor(2) as pool:
        yield {group: pool.submit(run, group) for group in GROUPS}


@pytest.mark.parametrize('group', GROUPS)
def test_gpu_kernels_in_a_process_of_their_own(runs, group):
    done = runs[group].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r'\d+ passed', done.stdout), done.stdout


def test_serving_on_the_cpu_loads_no_triton():
    code = ('import sys, quantvla_ros.policies.runtime, quantvla_ros.quant.linear\n'
            'import quantvla_ros.policies.loading, quantvla_ros.sim.rendering\n'
            'print([m for m in sys.modules if m == "triton" or ".kernels.cuda" in m])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.stdout.strip() == '[]'


def test_everything_imports_without_triton():
    code = ('import importlib, sys\nsys.modules["triton"] = None\n'
            'for name in sys.argv[1:]: importlib.import_module(name)\n'
            'from quantvla_ros.kernels import dispatch, weights\nimport torch\n'
            'w = weights.pack(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), 8)\n'
            'try: dispatch.prepare(w, device="cuda")\n'
            'except ValueError as error: print(error)')
    package = ROOT / 'quantvla_ros'
    names = ['.'.join(path.relative_to(ROOT).with_suffix('').parts)
             for path in (*package.glob('kernels/cuda/*.py'), *package.glob('policies/cuda_*.py'),
                          *package.glob('bench/gpu*.py'))]
    assert len(names) > 20
    done = subprocess.run([sys.executable, '-c', code, *names], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr
    assert 'Triton cannot be imported' in done.stdout and 'pip install triton' in done.stdout
