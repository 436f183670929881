# SPDX-License-Identifier: Apache-2.0
"""Turn a graph into a launch description; the only module that imports launch.

Decides nothing: names, parameters, remappings and variables are those of graph.py.
"""

from __future__ import annotations

from typing import Any

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from quantvla_ros.graph import Graph, Process, Value, graph_named
from quantvla_ros.resources import PACKAGE


def describe(name: str) -> LaunchDescription:
    """Return the launch description of a graph, with its arguments, defaults and choices."""
    graph = graph_named(name)
    declared = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.text,
            description=argument.description,
            **({'choices': list(argument.choices)} if argument.choices else {}),
        )
        for argument in graph.arguments
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_start, args=[graph])])


def _start(context: LaunchContext, graph: Graph) -> list[Any]:
    given = {
        argument.name: LaunchConfiguration(argument.name).perform(context)
        for argument in graph.arguments
    }
    return [_action(process) for process in graph.processes(given)]


def _parameter(value: Value) -> Any:
    """Keep a text a text: launch would read '1' as a number."""
    return ParameterValue(value, value_type=str) if isinstance(value, str) else value


def _action(process: Process) -> Any:
    common: dict[str, Any] = {
        'additional_env': dict(process.environment),
        'output': 'screen',
    }
    if process.required:
        common['on_exit'] = [Shutdown(reason=f'{process.name} ended')]
    if process.command:
        return ExecuteProcess(cmd=list(process.command), name=process.name, **common)
    parameters = {name: _parameter(value) for name, value in process.parameters.items()}
    return Node(
        package=PACKAGE,
        executable=process.executable,
        name=process.node,
        namespace=process.namespace,
        parameters=[*process.parameter_files, parameters],
        remappings=list(process.remappings.items()),
        ros_arguments=['--log-level', process.log_level],
        **common,
    )
