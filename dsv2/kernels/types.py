"""The arguments and results of kernels that are more than one plain tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """The experts of each token. Balance losses, statistics and token dropping are computed from it."""

    expert_ids_TK: Tensor  # int64, by descending affinity
    affinity_TK: Tensor  # fp32: the affinities of these experts, not renormalised; gradient flows
    affinity_TE: Tensor  # fp32: s_i of eq. 22, before any masking; gradient flows


class Routing(NamedTuple):
    """The router's result."""

    choice: Choice
    weights_TK: Tensor  # fp32: g_i of eq. 20, by which each expert's output is multiplied


class SequenceSums(NamedTuple):
    """Sums over each sequence's tokens, fp32 (exact for counts): all that losses and statistics need."""

    affinity_BE: Tensor  # of s; gradient flows
    selected_BE: Tensor  # tokens that select the expert
    sent_BG: Tensor  # tokens with an expert in the group
    entropy_B: Tensor  # of the affinity's entropy, nats
    top1_B: Tensor  # of the highest affinity selected


class RowMap(NamedTuple):
    """Rows for some of the tokens' slots, ordered by a key.

    A slot stands for one token and one of its experts, or for one token and one rank.
    """

    slots: Tensor  # int64 [rows]: each row's slot, an index into tokens x slots per token
    places: Tensor  # int32 [T, slots per token]: each slot's row, -1 without one

    @property
    def n_slots(self) -> int:
        """Return the number of slots per token."""
        return self.places.shape[1]

    def tokens(self) -> Tensor:
        """Return each row's token, int64 [rows]."""
        return self.slots // self.n_slots

    def first(self, n_rows: int) -> "RowMap":
        """Return the map of the first rows, where no slot has a later row."""
        return self._replace(slots=self.slots[:n_rows])


@dataclass
class LateGradients:
    """Stands for the experts' weights in autograd's graph."""

    handle: Tensor  # [], an input of the experts' node; its value means nothing
    box: "list[Callable[[], tuple[Tensor, Tensor]]]"  # the experts' backward pass adds what computes them


class AdamWStep(NamedTuple):
    """The numbers of one AdamW update of one parameter."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int  # counted from 1
    seed: int  # of the stochastic rounding, 0 .. 2^31 - 1; each parameter has its own
