"""LoaderState: where a loader stands, what it must agree with, in under 1 KB of JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from latentds.errors import ContractError

STATE_VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Position and everything the order depends on; neither ranks nor workers.

    dataset_id  of the stored patches; of a mixture, of its sets' identities
    revision    commit or manifest the location resolved to, None for local folders
    selection   digest of `where` and `slides`, None without
    mixture     digest of weights and epoch length, None for one set
    epoch, batch   the next global batch
    """

    version: int
    dataset_id: str
    latent_id: str
    revision: str | None
    split: str
    shuffle: bool
    seed: int
    global_batch_size: int
    last: str
    lanes: int
    balance: str | None
    selection: str | None
    mixture: str | None
    epoch: int
    batch: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def check_state(state: dict[str, Any], own: LoaderState, folder: object) -> LoaderState:
    """The position of `state`; ContractError where it is of another data set or order."""
    for name, value in own.to_json().items():
        found = state.get(name)
        if name in ("epoch", "batch"):
            if type(found) is not int or found < 0:
                raise ContractError(f"loader state has {name} {found!r}; damaged")
        elif found != value and not (name == "revision" and None in (found, value)):
            raise ContractError(
                f"{folder}: loader state has {name} {found!r}, this loader {value!r}; open the "
                "same data set (and revision) with the same split, selection, seed, shuffle, last, "
                "lanes and global_batch_size"
            )
    return dataclasses.replace(own, epoch=state["epoch"], batch=state["batch"])
