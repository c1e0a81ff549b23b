"""Kernels of other projects, through small adapters: every module here defines a PEER.

A peer that is not installed, needs another device or has no such feature is a row that says so.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from dcpo_kernels.bench import plain
from dcpo_kernels.bench.calls import Call, Implementation
from dcpo_kernels.bench.inputs import Inputs
from dcpo_kernels.bench.operators import Function, Operator, read, two_pass
from dcpo_kernels.bench.shapes import Case


@dataclass(frozen=True)
class Peer:
    name: str
    distribution: str  # as pip knows it
    devices: tuple[str, ...]
    lacks: Callable[[Operator, Case], str]  # what keeps it from doing a case; empty if nothing does
    call: Callable[[Operator, Inputs], Call]  # imports it
    note: str = ""
    traffic: Callable[[Operator, Inputs], int] | None = None  # bytes, where its design is known


def implementation(peer: Peer, operator: Operator, inputs: Inputs) -> Implementation:
    reason = "has no such operator" if operator.only_ours else peer.lacks(operator, inputs.case)
    traffic = None if reason or peer.traffic is None else peer.traffic(operator, inputs)

    def missing(why: str, version: str = "") -> Implementation:
        return Implementation(peer.name, "peer", None, why, version, traffic)

    try:
        version = metadata.version(peer.distribution)
    except metadata.PackageNotFoundError:
        return missing(f"not installed (pip install {peer.distribution})")
    if not reason and inputs.case.device not in peer.devices:
        reason = f"does not run on {inputs.case.device}"
    if reason:
        return missing(reason, version)
    try:
        call = peer.call(operator, inputs)
    except ImportError as error:
        return missing(f"can't be imported: {error}", version)
    return Implementation(peer.name, "peer", lambda: call, peer.note, version, traffic)


def from_logprobs(
    operator: Operator, inputs: Inputs, logprobs: Function, overwrites: bool = False
) -> Call:
    """An operator on top of a peer that has log-probs only: PyTorch adds the policy loss, as in the
    trainers that use it."""
    function = logprobs
    if operator.takes_objective:
        function = plain.policy_loss(**inputs.loss_arguments(), logprobs_of=logprobs)
    return Call(operator, inputs, function, overwrites=overwrites and operator.backward)


def read_read_write(operator: Operator, inputs: Inputs) -> int:
    """Traffic of one kernel forward and one backward: what all of them do today."""
    kind = two_pass if operator.backward else read
    return kind.minimum_bytes(inputs)


def lacks_nothing(operator: Operator, case: Case) -> str:
    return ""


def of_logprobs(
    name: str,
    devices: tuple[str, ...],
    logprobs: Callable[[Inputs], tuple[Function, bool]],
    distribution: str = "",
    note: str = "",
    traffic: Callable[[Operator, Inputs], int] | None = read_read_write,
) -> Peer:
    """A peer that has log-probs only. logprobs imports it, and says whether it overwrites what it
    reads."""

    def call(operator: Operator, inputs: Inputs) -> Call:
        return from_logprobs(operator, inputs, *logprobs(inputs))

    return Peer(name, distribution or name, devices, lacks_nothing, call, note, traffic)


def _found() -> dict[str, Peer]:
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = [importlib.import_module(f"{__name__}.{name}").PEER for name in names]
    return {peer.name: peer for peer in found}


PEERS = _found()
