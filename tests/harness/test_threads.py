from __future__ import annotations

import threading

import pytest

from harness import threads


def test_what_is_worked_out_keeps_its_order() -> None:
    assert threads.in_threads(pow, range(100), [2] * 100) == [n**2 for n in range(100)]
    assert threads.in_threads(str, []) == []


def test_a_fault_is_raised_where_it_was_asked_for() -> None:
    with pytest.raises(ZeroDivisionError):
        threads.in_threads(lambda n: 1 // n, [1, 0])


@pytest.mark.parametrize(("usable", "most"), [(2, 2), (64, 8)])
def test_there_are_no_more_threads_than_processors_nor_than_pay(
    usable: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "usable_processors", lambda: usable)
    together = threading.Barrier(most)
    threads.in_threads(lambda _: together.wait(10), range(most))  # none goes on before all are there
    crowd = threading.Barrier(most + 1)
    with pytest.raises(threading.BrokenBarrierError):
        threads.in_threads(lambda _: crowd.wait(0.2), range(most + 1))
