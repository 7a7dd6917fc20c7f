"""Groups of devices of different sizes for sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.errors import UserError, check_range
from mixtura.methods.placements import Placer
from mixtura.methods.placements._sequences import even_runs, grouped_sequences
from mixtura.methods.placements._shared import placed_in_order
from mixtura.types.placement import Cluster, Placement, SequenceGroup
from mixtura.types.trace import Trace

METHOD = {
    "paper": 146,
    "title": "Data-Centric and Heterogeneity-Adaptive Sequence Parallelism for Efficient LLM Training",
    "tags": ["sequences", "needs:scipy"],
}


@final
class Flexsp(Placer):
    """Split long sequences over many devices and short ones over few, in groups of sizes chosen for a batch.

    Sequence parallelism that adapts to how long sequences are: a group of d devices shares each of its
    sequences, which takes ``(square_s s^2 + linear_s s) / d`` seconds for s tokens, and an all-to-all whose
    slowness grows with d, more so between nodes. An integer program chooses the sizes of groups, powers of
    two, and which sequences each gets, so that the last is ready soonest and no device holds more than
    ``most_tokens``. Where that cannot be at once, sequences go, the longest first, in as few micro-batches as
    possible, cut such that the largest has the fewest tokens.

    Shapes:
        Sequences are the trace's. Experts lie as in the placement contiguous.

    Raises:
        SettingError: a setting is out of range.
        UserError: scipy is not installed, the trace knows no sequences, or one does not fit all devices.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> trace = sample_trace()
        >>> groups = Flexsp(most_tokens=100, row_num_bytes=1 << 20).plan(trace, sample_cluster()).groups
        >>> trace.sequence_lengths, [(len(group.devices), group.sequences) for group in groups]
        ((80, 160), [(2, (1,)), (1, (0,))])

    Differences from the paper:
        Read in its abstract and in the code of its planner. Solved by HiGHS instead of SCIP. Sequences of one
        bucket count as long as its longest; buckets have equally many sequences, where the authors choose
        them by dynamic programming. Groups of one device are tried, too, and devices may be left over. The
        authors' measured times are replaced by ``square_s``, ``linear_s`` and the cluster's links, with
        ``row_num_bytes`` a token that is exchanged four times.

    Reference:
        Data-Centric and Heterogeneity-Adaptive Sequence Parallelism for Efficient LLM Training (paper 146).
    """

    def __init__(
        self,
        *,
        most_tokens: int = 16384,
        buckets: int = 16,
        square_s: float = 5.128e-9,
        linear_s: float = 1.84e-4,
        row_num_bytes: int = 8192,
        seconds: float = 10.0,
    ) -> None:
        check_range("Flexsp", "most_tokens", most_tokens, 1, 1 << 40)
        check_range("Flexsp", "buckets", buckets, 1, 1024)
        check_range("Flexsp", "square_s", square_s, 0, 1)
        check_range("Flexsp", "linear_s", linear_s, 0, 1)
        check_range("Flexsp", "row_num_bytes", row_num_bytes, 1, 1 << 24)
        check_range("Flexsp", "seconds", seconds, 0.1, 1e6)
        self.most_tokens = most_tokens
        self.buckets = buckets
        self.square_s = square_s
        self.linear_s = linear_s
        self.row_num_bytes = row_num_bytes
        self.seconds = seconds

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        lengths = trace.sequence_lengths
        if not lengths:
            raise UserError(
                "this trace does not say how long its sequences are, which flexsp has to split; observe "
                "again with this mixtura"
            )
        largest = 1 << cluster.num_devices.bit_length() - 1
        if max(lengths) > self.most_tokens * largest:
            raise UserError(
                f"a sequence of {max(lengths)} tokens does not fit {largest} devices with "
                f"{self.most_tokens} each, the largest group of {cluster.num_devices} (a power of two); set "
                "most_tokens higher or take more devices"
            )
        order = sorted(range(len(lengths)), key=lambda one: (-lengths[one], one))
        least = -(-sum(lengths) // (self.most_tokens * cluster.num_devices))
        for num_batches in range(max(least, 1), len(order) + 1):
            batches = even_runs(order, lengths, num_batches)
            found = [self._grouped([lengths[one] for one in batch], cluster) for batch in batches]
            known = [one for one in found if one is not None]
            if len(known) == len(batches):
                break
        else:
            raise UserError(f"no groups were found in {self.seconds:g} s; set seconds of flexsp higher")
        groups = []
        for number, (batch, grouped) in enumerate(zip(batches, known, strict=True)):
            first = 0
            for degree, members in grouped:
                devices = tuple(range(first, first + degree))
                sequences = tuple(batch[one] for one in members)
                groups.append(SequenceGroup(micro_batch=number, devices=devices, sequences=sequences))
                first += degree
        return placed_in_order(trace, cluster, groups=tuple(groups))

    def seconds_of(self, lengths: Sequence[int], degree: int, cluster: Cluster) -> float:
        """How long a group of so many devices takes for some sequences."""
        return sum(self._seconds_of_one(length, degree, cluster) for length in lengths)

    def _seconds_of_one(self, length: int, degree: int, cluster: Cluster) -> float:
        link = cluster.within if degree <= cluster.devices_per_node else cluster.between
        moved = 0.0 if degree == 1 else 4 * length * self.row_num_bytes / (degree * link.bytes_per_s)
        return (self.square_s * length**2 + self.linear_s * length) / degree + moved

    def _grouped(self, lengths: Sequence[int], cluster: Cluster) -> list[tuple[int, list[int]]] | None:
        return grouped_sequences(
            lengths,
            cluster.num_devices,
            lambda length, degree: self._seconds_of_one(length, degree, cluster),
            most_tokens=self.most_tokens,
            num_buckets=self.buckets,
            seconds=self.seconds,
        )
