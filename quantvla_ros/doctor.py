# SPDX-License-Identifier: Apache-2.0
"""`quantvla doctor`: tell what this machine has, what is missing, and what to do about it.

Changes nothing and starts no node. Exit status 1 when something that a robot needs is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quantvla_ros.contract import load_contract

OK, NOTE, BAD = 'ok', 'note', 'BAD'
FLAGS = ('avx2', 'fma', 'f16c', 'avx512f', 'avx512bw', 'avx512_vnni', 'avx_vnni', 'amx_int8',
         'asimd', 'asimddp', 'i8mm')


@dataclass(frozen=True)
class Finding:
    """One line: how it is, what it is, and the sentence."""

    level: str
    name: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla doctor`."""
    parser.add_argument('--contract', default='libero_panda',
                        help='check this contract, by name or path')
    parser.add_argument('model', nargs='?', default='',
                        help='folder of a checkpoint: what it is, whether it is whole')


def run(args: argparse.Namespace) -> int:
    """Print every finding."""
    findings = list(examine(args.contract, args.model))
    for finding in findings:
        print(f'{finding.level:<5} {finding.name:<10} {finding.text}')
    return int(any(finding.level == BAD for finding in findings))


def examine(contract: str, model: str) -> Iterator[Finding]:
    """Yield every finding, cheap ones first."""
    yield python()
    yield from ros()
    yield pictures()
    yield rendering()
    yield cv_bridge()
    yield version('torch', 'no policy but hold can run; pip install torch')
    yield compiler()
    yield Finding(OK, 'cpu', cpu_flags())
    yield from kernels()
    yield gpu()
    yield from checked('contract', contract, check_contract)
    if model:
        yield from model_findings(model, contract)


def checked(name: str, what: str, check: Callable[[str], str]) -> Iterator[Finding]:
    """Yield what a check says, or what it raises for the user."""
    try:
        yield Finding(OK, name, check(what))
    except (ValueError, FileNotFoundError) as error:
        yield Finding(BAD, name, str(error))


def python() -> Finding:
    """Tell the interpreter."""
    level = OK if (3, 10) <= sys.version_info[:2] <= (3, 12) else BAD
    return Finding(level, 'python', f'{platform.python_version()} at {sys.executable} '
                   '(3.10 to 3.12 are supported)')


def ros() -> Iterator[Finding]:
    """Tell where rclpy comes from and which middleware will be used."""
    spec = importlib.util.find_spec('rclpy')
    if spec is None or spec.origin is None:
        yield Finding(BAD, 'ros', "no rclpy; source a ROS 2 installation, or pip install '.[ros]'")
        return
    distro, inside = os.environ.get('ROS_DISTRO', ''), spec.origin.startswith(sys.prefix)
    where = 'wheels in this environment' if inside else f'the sourced installation {distro}'
    yield Finding(OK, 'ros', f'rclpy from {where} ({Path(spec.origin).parent})')
    try:
        name = importlib.import_module('rclpy.utilities').get_rmw_implementation_identifier()
        profile = os.environ.get('FASTRTPS_DEFAULT_PROFILES_FILE')
        yield Finding(OK, 'rmw', name + (f' with {profile}' if profile else
                                         ' (up and launch set the shipped profile)'))
    except ImportError as error:
        yield Finding(BAD, 'rmw', f'rclpy cannot be loaded: {error}')
    domain = os.environ.get('ROS_DOMAIN_ID', '0')
    reach = os.environ.get('ROS_AUTOMATIC_DISCOVERY_RANGE', 'SUBNET')
    yield Finding(OK, 'network', f'domain {domain}, discovery range {reach}')
    launch = all(importlib.util.find_spec(m) for m in ('launch_ros', 'ros2launch'))
    yield Finding(OK if launch else NOTE, 'launch', 'ros2 launch is here' if launch else
                  'no ros2 launch; `quantvla up` starts the same processes')


def version(name: str, otherwise: str, level: str = NOTE) -> Finding:
    """Tell the version of an installed package."""
    try:
        return Finding(OK, name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(level, name, f'not installed: {otherwise}')


def pictures() -> Finding:
    """Tell whether cv2 loads, and that only one package provides it."""
    providers = sorted(set(importlib.metadata.packages_distributions().get('cv2', [])))
    if len(providers) > 1:
        return Finding(BAD, 'cv2', f'{", ".join(providers)} overwrite each other; keep one')
    try:
        cv2 = importlib.import_module('cv2')
    except ImportError as error:
        return Finding(NOTE, 'cv2', f'{error}; needed for compressed pictures: '
                       'sudo apt-get install libgl1 libglib2.0-0')
    return Finding(OK, 'cv2', f'{cv2.__version__} from {providers[0] if providers else "ROS"}')


def rendering() -> Finding:
    """Tell which GL library renders without a display."""
    if importlib.util.find_spec('mujoco') is None:
        return Finding(NOTE, 'gl', "no mujoco, so no simulated robot; pip install '.[all]'")
    module = importlib.import_module('quantvla_ros.sim.rendering')
    chosen = os.environ.get('MUJOCO_GL', '')
    if chosen == 'disable':
        return Finding(NOTE, 'gl', module.NO_GL)
    return Finding(OK, 'gl', f'MuJoCo renders with {chosen}')


def cv_bridge() -> Finding:
    """Tell whether cv_bridge is there; it is never required."""
    if importlib.util.find_spec('cv_bridge') is None:
        return Finding(NOTE, 'cv_bridge', 'not here; pictures are decoded without it')
    return Finding(OK, 'cv_bridge', 'used for pictures')


def compiler() -> Finding:
    """Tell the C++ compiler."""
    found = next((shutil.which(name) for name in ('c++', 'g++', 'clang++') if shutil.which(name)),
                 None)
    if found is None:
        return Finding(NOTE, 'compiler', 'no C++ compiler; only kernels built already can run')
    line = subprocess.run([found, '--version'], capture_output=True, text=True).stdout
    return Finding(OK, 'compiler', line.split('\n')[0])


def cpu_flags() -> str:
    """Name the CPU and those instruction sets that integer kernels ask for."""
    text = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').is_file() else ''
    words = set(text.split())
    names = [line.split(':')[1].strip() for line in text.split('\n') if 'model name' in line]
    flags = ' '.join(flag for flag in FLAGS if flag in words)
    return f'{names[0] if names else platform.machine()}, {os.cpu_count()} cores: {flags}'


def kernels() -> Iterator[Finding]:
    """Tell which integer kernels run, and why not the others."""
    if importlib.util.find_spec('torch') is None:
        return
    about = importlib.import_module('quantvla_ros.kernels.dispatch').describe()
    reference = str(about.get('kernels', '')).startswith('reference')
    for name, text in about.items():
        level = NOTE if reference and name == 'kernels' else OK
        yield Finding(level, 'kernels', text if name == 'kernels' else f'{name}: {text}')


def gpu() -> Finding:
    """Tell the card, and whether its kernels can be compiled; Triton itself is not loaded."""
    if importlib.util.find_spec('torch') is None:
        return Finding(NOTE, 'gpu', 'no torch, so no device: cuda')
    cuda = importlib.import_module('torch').cuda
    if not cuda.is_available():
        return Finding(NOTE, 'gpu', 'none that torch can use; everything runs on the CPU')
    if importlib.util.find_spec('triton') is None:
        return Finding(BAD, 'gpu', f'{cuda.get_device_name()}, without Triton; pip install triton')
    return Finding(OK, 'gpu', cuda.get_device_name())


def check_contract(name: str) -> str:
    """Read a contract and say what it holds."""
    contract = load_contract(name)
    return (f'{name}: {contract.robot}, cameras {", ".join(contract.camera_names)}, '
            f'{len(contract.action.joints)} joints by {contract.controller.kind} at '
            f'{contract.controller.rate_hz:g} Hz')


def model_findings(folder: str, contract: str) -> Iterator[Finding]:
    """Say what a model folder is, whether it is whole, and what still lacks."""
    path = Path(folder).expanduser()
    if (path / 'policy.json').is_file():
        from quantvla_ros.policies.libero_checkpoint import read_checkpoint

        yield from checked(
            'model', folder,
            lambda _: f'{folder}: {read_checkpoint(path)[1].parameter_count / 1e6:.1f} million '
            'weights of the shipped kind, every key, shape and hash right',
        )
        return
    from quantvla_ros.doctor_model import describe_model

    try:
        agreed = load_contract(contract)
    except (ValueError, FileNotFoundError):
        agreed = None  # the contract's own line tells
    for level, line in describe_model(path, agreed):
        yield Finding(level, 'model', line)
