"""Groups of devices for sequences of a batch, by an integer program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mixtura.methods.placements._programs import Program


def even_runs(order: Sequence[int], lengths: Sequence[int], num_runs: int) -> list[list[int]]:
    """An order cut into so many runs at most, such that the run with most tokens has the fewest.

    >>> even_runs([0, 1, 2, 3], [8, 4, 3, 3], 2)
    [[0], [1, 2, 3]]
    """

    def cut(most: int) -> list[list[int]]:
        runs: list[list[int]] = [[]]
        held = 0
        for one in order:
            if runs[-1] and held + lengths[one] > most:
                runs.append([])
                held = 0
            runs[-1].append(one)
            held += lengths[one]
        return runs

    low, high = max(lengths[one] for one in order), sum(lengths[one] for one in order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= num_runs else (middle + 1, high)
    return cut(low)


def grouped_sequences(
    lengths: Sequence[int],
    num_devices: int,
    seconds_of: Callable[[int, int], float],
    *,
    most_tokens: int,
    num_buckets: int,
    seconds: float,
) -> list[tuple[int, list[int]]] | None:
    """Sizes of groups, powers of two, and the sequences of each by place; None where not all fit at once.

    Args:
        lengths: of sequences, the longest first.
        num_devices: P.
        seconds_of: what a sequence of so many tokens takes a group of so many devices.
        most_tokens: that a device may hold.
        num_buckets: into which sequences go; those of one count as long as its longest.
        seconds: after which the best that was found is taken.
    """
    size = -(-len(lengths) // num_buckets)
    members = [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]
    degrees = [1 << power for power in range(num_devices.bit_length())]
    slots = [d for d in reversed(degrees) for _ in range(min(num_devices // d, len(lengths)))]
    program = Program("the placement flexsp")
    used = program.variables(len(slots))
    counts = program.variables(len(members), len(slots), most=float(size))
    last = program.variables(1, cost=1.0, most=float("inf"), whole=False)
    program.require(zip(used, map(float, slots), strict=True), most=float(num_devices))
    for bucket, inside in enumerate(members):
        program.equal(counts[bucket], float(len(inside)))
    longest = [lengths[inside[0]] for inside in members]
    for slot, degree in enumerate(slots):
        # A sequence without tokens takes a group, too.
        tokens = [(one, float(max(length, 1))) for one, length in zip(counts[:, slot], longest, strict=True)]
        program.require([*tokens, (used[slot], -float(most_tokens * degree))], most=0.0)
        times = [seconds_of(length, degree) for length in longest]
        program.require([*zip(counts[:, slot], times, strict=True), (last[0], -1.0)], most=0.0)
    values = program.solved(seconds=seconds)
    if values is None:
        return None
    found: list[tuple[int, list[int]]] = []
    waiting = [list(inside) for inside in members]
    for slot, degree in enumerate(slots):
        wanted = [round(values[number]) for number in counts[:, slot]]
        taken = [left.pop(0) for left, num in zip(waiting, wanted, strict=True) for _ in range(num)]
        if taken:
            found.append((degree, taken))
    return found
