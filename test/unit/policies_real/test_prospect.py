# SPDX-License-Identifier: Apache-2.0
"""What is said of a checkpoint before it is loaded: room and artifact, of every family."""

import pytest

from quantvla_ros.policies.base import PolicySettings, look_ahead
from quantvla_ros.policies.checkpoints import CheckpointError
from quantvla_ros.policies.folders import identify
from quantvla_ros.policies.loading import install
from quantvla_ros.policies.networks import served_network
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.artifact import Provenance, write_artifact
from quantvla_ros.quant.recipes import find_recipe
from quantvla_ros.quant.scheme import parse_scheme
from quantvla_ros.quant.stream import round_streamed

FAMILIES = {'pi05_lerobot': 'pi05', 'pi0_lerobot': 'pi0', 'groot_n15_isaac': 'groot_n15',
            'smolvla_lerobot': 'smolvla', 'openvla_hf': 'openvla'}


def look(folder, name, precision):
    return look_ahead(FAMILIES[name], None, PolicySettings(model=str(folder), precision=precision))


def layers_of(folder, precision):
    """The layers of a network, rounded while they are read."""
    stored, layers = served_network(identify(folder)), {}
    round_streamed(policy_sites(stored.model), find_recipe('rtn'), parse_scheme(precision),
                   stored.read, layers.__setitem__)
    return layers


def held(folder, precision):
    """Bytes of what a loaded network holds; tiles that kernels fill up count in small ones only.

    Each tensor of a float network, or the quantized layers and the tensors beside them.
    """
    found = identify(folder)
    stored = served_network(found)
    install(stored, found, 'float', 'cpu')
    kept = {name: value.numel() * value.element_size()
            for name, value in stored.model.state_dict().items() if not value.is_meta}
    if precision == 'float':
        return sum(kept.values())
    layers = layers_of(folder, precision)
    inside = {f'{name}.{part}' for name in layers for part in ('weight', 'bias')}
    beside = sum(size for name, size in kept.items() if name not in inside)
    return beside + sum(layer.nbytes for layer in layers.values())


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('precision', ['float', 'w8a8', 'w4a8'])
def test_room_is_about_told_before_it_is_taken(folders, name, precision):
    folder = folders(name)
    told, taken = look(folder, name, precision).nbytes, held(folder, precision)
    assert 0.95 * taken <= told <= 1.4 * taken


@pytest.mark.parametrize('name', FAMILIES)
def test_less_room_is_told_for_fewer_bits(folders, name):
    sizes = [look(folders(name), name, precision).nbytes for precision in
             ('float', 'bfloat16', 'w8a8', 'w4a8')]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_artifact_is_what_the_gate_judges(folders, tmp_path):
    folder = folders('pi05_lerobot')
    layers = layers_of(folder, 'w4a8')
    write_artifact(tmp_path / 'made', layers, Provenance('', 'rtn', 'w4a8'))
    found = look(folder, 'pi05_lerobot', str(tmp_path / 'made'))
    assert found.artifact == tmp_path / 'made'
    rounded = look(folder, 'pi05_lerobot', 'w4a8')
    assert rounded.artifact is None
    assert found.nbytes == pytest.approx(rounded.nbytes, rel=0.3)


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(folders, tmp_path):
    with pytest.raises(ValueError, match="precision 'nowhere' is not one of"):
        look(folders('pi05_lerobot'), 'pi05_lerobot', 'nowhere')
    with pytest.raises(CheckpointError, match='holds neither'):
        look(tmp_path, 'pi05_lerobot', 'float')
