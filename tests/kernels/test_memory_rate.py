"""The rate of reading memory is bytes over the seconds of the clock that is given."""

from __future__ import annotations

from mixtura.kernels.rates import MemoryReader


def test_the_rate_goes_by_the_clock() -> None:
    times = iter((10.0, 12.0, 20.0, 20.5))
    reader = MemoryReader(1 << 20)
    assert reader.bytes_per_second(lambda: next(times)) == (1 << 20) / 2
    assert reader.bytes_per_second(lambda: next(times)) == (1 << 20) / 0.5
