# SPDX-License-Identifier: Apache-2.0
"""From a recognised folder to its network, whatever the family, without a contract.

What the contract decides (horizon, embodiment) changes no layer that is quantized.
"""

from __future__ import annotations

from collections.abc import Callable

from quantvla_ros.policies import savings
from quantvla_ros.policies.checkpoints import Stored
from quantvla_ros.policies.folders import Folder
from quantvla_ros.policies.groot_folder import groot_network
from quantvla_ros.policies.openvla_folder import openvla_network
from quantvla_ros.policies.pi_folder import pi_network
from quantvla_ros.policies.smolvla_folder import smolvla_network

NETWORKS: dict[str, Callable[[Folder], Stored]] = {
    'pi05': lambda folder: pi_network(folder, 1),
    'pi0': lambda folder: pi_network(folder, 1),
    'groot_n15': lambda folder: groot_network(folder, 1, 0),
    'smolvla': smolvla_network,
    'openvla': lambda folder: openvla_network(folder, 1, 1),
}


def network(folder: Folder) -> Stored:
    """Return the network of a folder as it is stored. Raises CheckpointError."""
    return NETWORKS[folder.family](folder)


def served_network(folder: Folder) -> Stored:
    """Return the network without what a served one drops: the layers that an artifact holds."""
    stored = network(folder)
    if folder.family != 'openvla':
        savings.drop_unused(stored.model, 1)
    return stored
