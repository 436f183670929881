# SPDX-License-Identifier: Apache-2.0
"""pip and colcon put the same files where ros2 run and ros2 launch look."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import quantvla_ros
from quantvla_ros.executables import EXECUTABLES

ROOT = Path(quantvla_ros.__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    '.git', '.venv', 'build', 'install', 'log', 'runs', 'bags', '__pycache__', '*.egg-info',
    '.*_cache', '.hypothesis', '.triton')
pytestmark = pytest.mark.skipif(
    not (ROOT / 'setup.py').is_file(), reason='needs the source tree, not an installation')


@pytest.fixture
def source(tmp_path):
    """Copy the source tree, so that a build leaves nothing in it."""
    return Path(shutil.copytree(ROOT, tmp_path / 'src' / 'quantvla_ros', ignore=LEFT_OUT))


def run(*command, cwd, **env):
    clean = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    clean['CXX'] = 'false'  # compiling the kernels takes a minute and is tested beside them
    done = subprocess.run(command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def shipped():
    """Every file of launch/, config/ and models/ -> the share folder it belongs to."""
    files = [path for folder in ('launch', 'config', 'models')
             for path in (ROOT / folder).rglob('*')
             if path.is_file() and '__pycache__' not in path.parts]
    assert files
    return [str(path.relative_to(ROOT)) for path in files]


def check_prefix(prefix):
    assert (prefix / 'share/ament_index/resource_index/packages/quantvla_ros').is_file()
    share = prefix / 'share/quantvla_ros'
    for name in ('package.xml', *shipped()):
        assert (share / name).read_bytes() == (ROOT / name).read_bytes(), name
    for name in EXECUTABLES:
        assert os.access(prefix / 'lib/quantvla_ros' / name, os.X_OK), name


def check_starter(prefix, site):
    """Starters find their own package, even from a folder that holds another one."""
    decoy = prefix / 'decoy'
    (decoy / 'quantvla_ros').mkdir(parents=True)
    (decoy / 'quantvla_ros/__init__.py').write_text('raise SystemExit("the decoy was imported")')
    (site / 'quantvla_ros/nodes/record_node.py').write_text(
        'import sys\ndef main():\n    print(sys.argv[1:])\n')
    starter = prefix / 'lib/quantvla_ros/record_node'
    out = run(str(starter), '--ros-args', 'a b', cwd=decoy, PYTHONPATH=str(site))
    assert out.strip() == "['--ros-args', 'a b']"


def test_pip_install_puts_files_where_ros_looks(source, tmp_path):
    prefix = tmp_path / 'prefix'
    run(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps',
        '--no-build-isolation', '--prefix', str(prefix), '.', cwd=source)
    check_prefix(prefix)
    assert (prefix / 'bin/quantvla').is_file()
    (site,) = prefix.glob('lib*/python*/site-packages')
    assert (site / 'quantvla_ros/kernels/cuda/tiles.json').is_file()
    check_starter(prefix, site)


@pytest.mark.parametrize('options', [(), ('--symlink-install',)], ids=['copies', 'symlinks'])
def test_colcon_build_puts_files_where_ros_looks(source, tmp_path, options):
    if importlib.util.find_spec('colcon_ros') is None:
        pytest.skip('colcon-ros is not installed')
    run(sys.executable, '-m', 'colcon', 'build', *options, cwd=tmp_path)
    prefix = tmp_path / 'install/quantvla_ros'
    check_prefix(prefix)
    assert os.access(prefix / 'lib/quantvla_ros/quantvla', os.X_OK)  # ros2 run quantvla_ros
    assert (prefix / 'share/quantvla_ros/package.sh').is_file()
    if not options:
        (site,) = prefix.glob('lib/python*/site-packages')
        check_starter(prefix, site)


# Versions --------------------------------------------------------------------------------------


def name_of(requirement):
    return re.split(r'[^A-Za-z0-9._-]', requirement.strip())[0].lower().replace('_', '-')


def pinned():
    lines = [line.split('#')[0].strip() for line in (ROOT / 'constraints.txt').open()]
    return [name_of(line) for line in lines if '==' in line]


def required():
    """Return the requirements that setup.py asks for, read from a run of it."""
    code = ('import setuptools, json; kept = {}; setuptools.setup = kept.update; '
            'import runpy; runpy.run_path("setup.py"); '
            'lists = [kept["install_requires"], *kept["extras_require"].values()]; '
            'print(json.dumps(sum(lists, [])))')
    return [name_of(r) for r in json.loads(run(sys.executable, '-c', code, cwd=ROOT))]


def test_every_requirement_has_its_version_in_the_constraints():
    assert sorted(set(required()) - set(pinned())) == []
    assert len(set(pinned())) == len([n for n in pinned() if n]), 'a package is pinned twice'


def test_one_package_provides_cv2():
    assert [name for name in pinned() if name.startswith('opencv')] == ['opencv-python']
    providers = importlib.metadata.packages_distributions().get('cv2', [])
    assert len(set(providers)) <= 1, f'{providers} all provide cv2; uninstall all but one'


def test_package_xml_names_every_message_package_that_is_imported():
    root = ElementTree.parse(ROOT / 'package.xml').getroot()
    assert root.get('format') == '3'
    depends = {element.text for element in root.findall('exec_depend')}
    words = r'^\s*(?:from|import) ((?:\w+_msgs|std_srvs|\w+_interfaces|rclpy)\b)'
    pattern = re.compile(words, re.M)
    imported = {name for path in (ROOT / 'quantvla_ros').rglob('*.py')
                for name in pattern.findall(path.read_text())}
    assert imported
    assert imported <= depends


def test_version_is_the_same_everywhere():
    version = quantvla_ros.__version__
    assert ElementTree.parse(ROOT / 'package.xml').getroot().findtext('version') == version
    assert f"version='{version}'" in (ROOT / 'setup.py').read_text()
