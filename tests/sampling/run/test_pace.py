"""The number of threads that is quickest, by what turns took."""

from fastgen.sampling.run.pace import TRIED_EVERY, Pace


def played(pace, seconds, turns):
    """The numbers of threads of some turns, each of which takes `seconds` of that number."""
    found = []
    for _ in range(turns):
        found.append(pace.threads())
        pace.took(found[-1], seconds(found[-1]))
    return found


def test_every_number_is_tried_and_the_quickest_kept():
    assert played(Pace(6), lambda threads: 1 / threads, 8) == [6, 3, 1, *[6] * 5]
    assert played(Pace(6), lambda threads: abs(threads - 3), 8) == [6, 3, 1, *[3] * 5]
    assert played(Pace(1), lambda threads: 1.0, 70) == [1] * 70


def test_another_number_is_tried_now_and_then():
    pace = Pace(4)
    first = played(pace, lambda threads: threads, 10 * TRIED_EVERY)
    assert set(first[3:]) == {4, 2, 1} and first.count(1) > 0.9 * len(first)
    later = played(pace, lambda threads: 1 / threads, 20 * TRIED_EVERY)  # the other processes have ended
    assert later[-TRIED_EVERY + 1 :].count(4) >= TRIED_EVERY - 2


def test_one_interruption_changes_nothing():
    pace = Pace(2)
    played(pace, lambda threads: 1 / threads, 8)
    pace.took(pace.threads(), 100.0)
    assert pace.threads() == 2
