"""The proxy's books against a plain model of what was placed and what the worker told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from halfmoon.proxy.load_book import LoadBook


def test_what_is_placed_counts_until_it_ends() -> None:
    book = LoadBook()
    first, second = book.place(100), book.place(20)
    assert book.num_tokens == 120
    second.grow(3)
    assert book.num_tokens == 123
    first.end()
    first.end()
    first.grow(50)
    assert book.num_tokens == 23
    second.end()
    assert book.num_tokens == 0


def test_a_prompt_counts_down_as_its_worker_reports() -> None:
    book = LoadBook()
    book.report(0)
    book.place(1000)
    assert book.num_left_tokens == 1000, "the last report knew nothing of it"
    book.report(0)
    assert book.num_left_tokens == 1000, "that report may have been on its way already"
    book.report(600)
    assert book.num_left_tokens == 600
    book.place(50)
    assert book.num_left_tokens == 650
    book.report(0)
    book.report(0)
    assert book.num_left_tokens == 0


def test_a_worker_that_never_reported_counts_in_full() -> None:
    book = LoadBook()
    book.place(1000)
    assert book.num_left_tokens == 1000


Step = tuple[str, int]


@given(st.lists(st.tuples(st.sampled_from(["place", "end", "grow", "report"]), st.integers(0, 50)), max_size=60))
def test_the_sums_hold_through_any_history(steps: list[Step]) -> None:
    book = LoadBook()
    bookings: list[tuple[object, list[int]]] = []  # booking, [tokens, number of reports when placed]
    num_reports, reported = 0, 0
    for action, number in steps:
        if action == "place":
            bookings.append((book.place(number), [number, num_reports]))
        elif action == "report":
            book.report(number)
            num_reports, reported = num_reports + 1, number
        elif bookings:
            booking, model = bookings[number % len(bookings)]
            if action == "end":
                booking.end()
                bookings.remove((booking, model))
            else:
                booking.grow(number)
                model[0] += number
        placed = sum(model[0] for _, model in bookings)
        unseen = sum(model[0] for _, model in bookings if num_reports - model[1] <= 1)
        assert book.num_tokens == placed
        assert book.num_left_tokens == (placed if num_reports == 0 else min(placed, reported + unseen))
