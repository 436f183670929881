# SPDX-License-Identifier: Apache-2.0
"""Makes policies, and tells beforehand what is known of one: in whatever process that happens.

`Maker` is what a node asks. LocalMaker does it here; isolated.py asks another process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from quantvla_ros.contract import Contract
from quantvla_ros.policies.base import Policy, PolicySettings, Prospect, look_ahead, make_policy


class Maker(Protocol):
    """Makes policies of one name for one contract. Raises ValueError or FileNotFoundError."""

    def look(self, settings: PolicySettings) -> Prospect:
        """Return what is known of a policy before anything is loaded."""

    def doubt(self, artifact: Path, calibration: str, limits: Mapping[str, Any]) -> str:
        """Return what the gate says against an artifact, '' for nothing; limits: gate.*."""

    def make(self, settings: PolicySettings, nice: int = 0) -> Policy:
        """Make a policy; takes its time, the more so the nicer it is where that can be had."""

    def close(self) -> None:
        """Give back what is needed for it; policies that were made end too where they can."""


class LocalMaker:
    """Makes policies in this process."""

    def __init__(self, name: str, contract: Contract) -> None:
        self._name, self._contract = name, contract

    def look(self, settings: PolicySettings) -> Prospect:
        """See Maker."""
        return look_ahead(self._name, self._contract, settings)

    def doubt(self, artifact: Path, calibration: str, limits: Mapping[str, Any]) -> str:
        """See Maker."""
        from quantvla_ros.quant.gate import GateLimits, gate

        return gate(artifact, calibration, GateLimits(**limits))

    def make(self, settings: PolicySettings, nice: int = 0) -> Policy:
        """See Maker. An artifact that changes while it is read is refused.

        Never nice: a thread that holds the interpreter and loses its core keeps the control
        thread waiting, whatever the priority of that one.
        """
        del nice
        policy = make_policy(self._name, self._contract, settings)
        artifact = self.look(settings).artifact
        if artifact is not None:
            from quantvla_ros.quant.artifact import verify_artifact

            verify_artifact(artifact)
        return policy

    def close(self) -> None:
        """See Maker; what is local goes with its last reference."""
